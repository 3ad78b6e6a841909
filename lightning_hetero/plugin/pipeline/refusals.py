"""Refuse what a pipeline cannot train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_hetero.distributed.optimizer_check import why_whole_model
from lightning_hetero.distributed.torch_private import BatchNorm, has_hooks
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common.parts_of_model import why_not_with

__all__ = [
    "refuse_backend",
    "refuse_divided_data",
    "refuse_foreign_parameters",
    "refuse_one_pipeline",
    "refuse_optimizers",
    "refuse_tensor_hooks",
    "refuse_training",
    "why_one_pipeline",
]


def refuse_training(
    module: LightningModule, callbacks: Iterable[Callback], precision: str | int, world_size: int
) -> None:
    """Refuse a training that cannot be split into stages, before any process is started.

    Args:
        module: The user's LightningModule.
        callbacks: The callbacks of its Trainer.
        precision: The Trainer's precision.
        world_size: Number of ranks.

    Raises:
        UnsupportedFeatureError: The training cannot be split; the message says why, and names a way out if there is
            one.
    """
    reason = None
    if not module.automatic_optimization:
        reason = "manual optimisation runs its own backward passes"
    elif precision == "16-mixed":
        reason = 'precision "16-mixed" scales the loss, and stages would have to agree when to skip; use "bf16-mixed"'
    for callback in callbacks:
        reason = why_not_with(callback, world_size) or reason
        if isinstance(callback, ModelPruning) and world_size > 1:
            name = type(callback).__name__
            reason = f"{name} replaces parameters after ranks have been given their layers; prune the model before it"
    if reason is not None:
        raise UnsupportedFeatureError(f"`hetero_pipeline` cannot train this: {reason}.")


def refuse_backend(device: torch.device) -> None:
    """Refuse a process group that cannot send tensors of ``device`` from one rank to another.

    Raises:
        UnsupportedFeatureError: It is gloo, whose point-to-point communication reads the memory of the host.
    """
    if device.type == "cpu" or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(",") if ":" in pair)
    if backends.get(device.type) == "gloo":
        raise UnsupportedFeatureError(
            f'`hetero_pipeline` cannot send tensors of {device} with `process_group_backend="gloo"`, which sends from'
            f" the memory of the host. Leave the argument out, so that the backend of the accelerator is used, or train"
            f" with `hetero_ddp`, which works over gloo."
        )


def refuse_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimisers that need the whole model on one rank.

    Raises:
        UnsupportedFeatureError: One of them needs it.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        try:
            reason = why_whole_model(optimizer)
        except Exception as error:  # optimisers raise whatever they like if they do not fit the trial
            rank_zero_warn(
                f"`hetero_pipeline`: whether {name} steps each parameter by itself could not be tried out: {error!r}."
                f" If it needs the gradients of all parameters at once, it trains another model than on one device."
            )
            continue
        if reason is not None:
            raise UnsupportedFeatureError(
                f"`hetero_pipeline` cannot train with {name}, which {reason}. Each stage steps the parameters of"
                f" its own layers. Use another optimiser."
            )


def refuse_foreign_parameters(module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimisers of tensors that the module does not have, whose gradients replicas would not add up.

    Raises:
        UnsupportedFeatureError: One of them has such a tensor.
    """
    known = {id(parameter) for parameter in module.parameters()}
    for optimizer in optimizers:
        if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
            raise UnsupportedFeatureError(
                f"`hetero_pipeline` with `replicas` adds up the gradients of the parameters of the module, got a tensor"
                f" in {type(optimizer).__name__} that is none of them. Assign it to the module as an nn.Parameter, or"
                f" use `replicas=1`."
            )


def why_one_pipeline(module: LightningModule) -> str | None:
    """Return why several replicas cannot train a module; None if nothing is known that speaks against it."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse and part.weight.requires_grad:
            return f"sparse gradients cannot be added up over ranks, got {name!r} with `sparse=True`"
        if isinstance(part, BatchNorm) and part.training:
            return f"the statistics of batch normalisation would be those of each replica's samples, got {name!r}"
    return None


def refuse_one_pipeline(module: LightningModule) -> None:
    """Refuse what only one pipeline can train.

    Raises:
        UnsupportedFeatureError: There is such a thing.
    """
    reason = why_one_pipeline(module)
    if reason is not None:
        raise UnsupportedFeatureError(
            f"`hetero_pipeline` cannot train this with several replicas: {reason}. Do without it, or use `replicas=1`."
        )


def refuse_tensor_hooks(module: LightningModule) -> None:
    """Refuse hooks on parameters, which a pipeline would call for each micro-batch, and not on every rank.

    Raises:
        UnsupportedFeatureError: A parameter has a hook.
    """
    for name, parameter in module.named_parameters():
        if has_hooks(parameter):
            raise UnsupportedFeatureError(
                f"`hetero_pipeline` computes gradients for each micro-batch, so a hook on the gradient of a parameter"
                f" does not see that of the batch, got one on {name!r}. Change the gradient in"
                f" `on_before_optimizer_step` instead."
            )


def refuse_divided_data(what: str | None) -> None:
    """Refuse data that the user has divided by rank.

    Args:
        what: Name of the class that divides the data; None if there is none.

    Raises:
        UnsupportedFeatureError: There is one.
    """
    if what is not None:
        raise UnsupportedFeatureError(
            f"`hetero_pipeline` trains all stages on the same batches, so data must not be divided by rank, got"
            f" {what!r}, which gives each rank a part. Give every rank all of the data, as on one device."
        )
