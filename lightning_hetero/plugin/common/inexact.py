"""Warn once about what no loss weight can make exact, and name the way out."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_hetero.distributed.torch_private import BatchNorm
from lightning_hetero.plugin.common.lightning_private import uses_post_local_sgd

__all__ = ["GATHERED", "inexact_parts", "normalises_batches", "warn_of_inexact"]

GATHERED = (
    "`all_gather` of the samples in a training step (in-batch negatives), because it needs mini-batches of equal size,"
    " and such a loss is not a mean over samples: the shares stay equal, as under strategy='ddp'"
)


def inexact_parts(module: nn.Module, strategy: DDPStrategy) -> list[str]:
    """Return whatever depends on how a global batch is divided, each with its reason and the way out.

    Args:
        module: The module that is trained.
        strategy: The strategy that trains it.
    """
    found = []
    batch_norm = _batch_normalisation(module)
    if batch_norm:
        others = " and others" if len(batch_norm) > 1 else ""
        found.append(
            f"batch normalisation ({batch_norm[0]!r}{others}), because it takes its statistics from each rank's"
            f" mini-batch: use Trainer(sync_batchnorm=True)"
        )
    if uses_post_local_sgd(strategy):
        found.append(
            "post-local SGD, because it averages the ranks' parameters as if their mini-batches were equal: use"
            " another communication hook, or equal shares: HeteroDDPStrategy(shares=[1, ...])"
        )
    return found


def normalises_batches(module: nn.Module) -> bool:
    """Return whether a layer takes statistics of each rank's mini-batch."""
    return bool(_batch_normalisation(module))


def _batch_normalisation(module: nn.Module) -> list[str]:
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)
    ]


def warn_of_inexact(parts: list[str]) -> None:
    """Warn once about all ``parts``, if there are any."""
    if parts:
        rank_zero_warn(f"`hetero_ddp` cannot be exact with unequal mini-batches for {'; nor for '.join(parts)}.")
