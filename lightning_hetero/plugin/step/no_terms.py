"""Keep a mean over no terms, 0/0, out of what a step logs and returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_hetero.plugin.common.overridden import overridden

__all__ = ["logging_without_terms", "weighted", "with_weighted_gradient"]


@contextmanager
def logging_without_terms(module: LightningModule) -> Iterator[None]:
    """Log what is not a number in this context as a value of no samples.

    A step whose batch has no loss terms computes the mean of nothing. The other ranks have values, and so would a
    single process.
    """
    log = module.log

    def log_numbers(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        kept = torch.as_tensor(value) if isinstance(value, float) else value
        if isinstance(kept, Tensor) and kept.is_floating_point() and bool(kept.isnan().any()):
            log(name, torch.zeros_like(kept), *args, **{**kwargs, "batch_size": 0})
        else:
            log(name, value, *args, **kwargs)

    with overridden(module, "log", log_numbers):
        yield


def weighted(loss: Tensor, weight: float) -> Tensor:
    """Return ``loss * weight``; 0 for weight 0, even if the loss is not finite, in the same graph."""
    return (loss if weight else torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)) * weight


def with_weighted_gradient(loss: Tensor, weight: float) -> Tensor:
    """Return a loss of the same value whose gradient is that of ``weighted(loss, weight)``.

    Hooks of the backward pass are given the loss, and log it.
    """
    if weight == 1.0:
        return loss
    return _WeightedGradient.apply(loss, weight) if weight else weighted(loss, weight)  # type: ignore[no-untyped-call]


class _WeightedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0] * ctx.weight, None
