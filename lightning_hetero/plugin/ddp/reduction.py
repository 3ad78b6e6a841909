"""The contribution of a rank to a value that is reduced over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_reduce"]


def to_reduce(tensor: Tensor, reduce_op: str, weight: float = 1.0, stands_in: bool = False) -> Tensor:
    """Return the value to reduce instead of ``tensor``, so that the result is that of a single process.

    Args:
        tensor: The value of this rank.
        reduce_op: Name of the operation that combines the values of all ranks, in lower case.
        weight: Weight of this rank's mean in the current step; 1 outside a step.
        stands_in: Whether the rank runs the current step on a stand-in.
    """
    mean = reduce_op in ("mean", "avg")
    if mean and not tensor.is_floating_point() and not tensor.is_complex():
        # Lightning averages integer counts over ranks and rounds the result down, so a mean over 3 and 4 samples would
        # be divided by 3; see its issue #21859
        tensor = tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
    if stands_in or (mean and weight == 0.0):
        # a product would not do: the value may be infinite
        return torch.full_like(tensor, _neutral(tensor, reduce_op))
    return tensor * weight if mean and weight != 1.0 else tensor


def _neutral(tensor: Tensor, reduce_op: str) -> float | int:
    """Return the neutral element of ``reduce_op`` for the type of ``tensor``."""
    if "max" in reduce_op or "min" in reduce_op:
        limits = torch.finfo(tensor.dtype) if tensor.is_floating_point() else torch.iinfo(tensor.dtype)
        return limits.min if "max" in reduce_op else limits.max
    return 1 if "prod" in reduce_op else 0
