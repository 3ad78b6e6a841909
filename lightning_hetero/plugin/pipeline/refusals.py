"""Refuse what a pipeline cannot train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from torch.optim import LBFGS, Optimizer

from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common.parts_of_model import why_not_with

__all__ = ["refuse_backend", "refuse_optimizers", "refuse_training"]


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
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise UnsupportedFeatureError(
            "`hetero_pipeline` cannot train with LBFGS, which runs the step several times and compares gradients of all"
            " parameters. Use another optimiser."
        )
