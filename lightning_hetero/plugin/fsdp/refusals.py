"""Refuse what shards cannot train exactly, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hetero.distributed.shards.optimizer_check import why_not_in_parts
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common.parts_of_model import why_not_with
from lightning_hetero.plugin.ddp.shared_faults import is_compiled

__all__ = ["refuse_module", "refuse_optimizers", "refuse_training", "warn_of_kept"]


def refuse_training(callbacks: Iterable[Callback], world_size: int) -> None:
    """Refuse callbacks that need the whole model on one rank, before any process is started.

    Raises:
        UnsupportedFeatureError: One of them needs it.
    """
    for callback in callbacks:
        reason = why_not_with(callback, world_size)
        if isinstance(callback, ModelPruning):
            reason = f"{type(callback).__name__} compares all weights of a layer, of which each rank has only a part"
        if reason is not None:
            raise UnsupportedFeatureError(f"`hetero_fsdp` cannot train this: {reason}.")


def refuse_module(module: LightningModule) -> None:
    """Refuse modules whose parameters cannot be gathered and released.

    Raises:
        UnsupportedFeatureError: The module has been compiled, or has parameters without a known shape.
    """
    if is_compiled(module):
        raise UnsupportedFeatureError(
            "`hetero_fsdp` cannot train a module that torch.compile has compiled: the compiled code does not call the"
            ' hooks that gather parameters. Leave torch.compile out, or use strategy="hetero_ddp".'
        )
    lazy = [name for name, p in module.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise UnsupportedFeatureError(
            f"`hetero_fsdp` must know the shape of every parameter before the first step, got the lazy parameter"
            f" {lazy[0]!r}. Give the layer its sizes, or run it once in the module's constructor."
        )
    scripted = [part for part in module.modules() if isinstance(part, torch.jit.ScriptModule)]
    if any(True for part in scripted for _ in part.parameters()):
        raise UnsupportedFeatureError(
            "`hetero_fsdp` cannot gather the parameters of modules that torch.jit has scripted or traced: they take no"
            ' hooks. Use the module itself, or strategy="hetero_ddp".'
        )
    for name, parameter in module.named_parameters():
        if type(parameter.data) is not Tensor:
            raise UnsupportedFeatureError(
                f"`hetero_fsdp` cannot divide parameter {name!r}, whose data is of the class"
                f" {type(parameter.data).__name__} and not an ordinary tensor. Take the quantisation or distribution of"
                f' its layer out, or use strategy="hetero_ddp".'
            )


def warn_of_kept(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Warn if a module keeps the parameters that were replaced by parts, or their identities, in its attributes.

    Those objects still do what is asked of them, but they are not those of `parameters()`.

    Args:
        module: The module.
        parameters: The parameters that it had.
    """
    ids = {id(parameter) for parameter in parameters}
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute.startswith("_") or not isinstance(value, list | tuple | set | frozenset | dict):
                continue
            entries = [*value, *value.values()] if isinstance(value, dict) else value
            if any(id(entry) in ids or (isinstance(entry, int) and entry in ids) for entry in entries):
                rank_zero_warn(
                    f"`hetero_fsdp`: the attribute {f'{name}.{attribute}'.lstrip('.')!r} keeps parameters, or their"
                    f" `id`, of the time before the set-up. `self.parameters()` returns others since, so it contains"
                    f" none of them. Compare names, or make the collection in `configure_optimizers`."
                )
                return


def refuse_optimizers(
    optimizers: Sequence[Optimizer], shards: Sequence[nn.Parameter], weights: Sequence[float], device: torch.device
) -> None:
    """Refuse optimisers that look at whole parameters, and parameters that are not in shards.

    Every rank must call this at the same point.

    Args:
        optimizers: The optimisers that the module has made.
        shards: The parts of all parameters.
        weights: One weight per rank, in proportion to which the ranks hold parts.
        device: Device of this rank.

    Raises:
        UnsupportedFeatureError: An optimiser cannot be used.
    """
    known = {id(shard) for shard in shards}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
        if any(id(parameter) not in known for parameter in parameters):
            raise UnsupportedFeatureError(
                f"`hetero_fsdp` replaces the parameters of the module by parts before it calls `configure_optimizers`,"
                f" but {name} has been given a tensor that is none of them. Take the parameters from"
                f" `self.parameters()` inside of `configure_optimizers`, not in the constructor."
            )
        reason = why_not_in_parts(optimizer, weights, device)
        if reason is not None:
            raise UnsupportedFeatureError(
                f"`hetero_fsdp` cannot train with {name}, because each rank has only a part of most parameters:"
                f" {reason.rstrip('.')}. Use an optimiser that treats each number by itself, such as SGD or AdamW, or"
                f' strategy="hetero_ddp".'
            )
