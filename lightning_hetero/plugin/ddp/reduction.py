"""What a rank contributes to a value that is reduced over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_reduce"]


def to_reduce(tensor: Tensor, reduce_op: str, weight: float = 1.0, stands_in: bool = False) -> Tensor:
    """Return what to reduce in the place of ``tensor``, such that the result is what a single process would find.

    Args:
        tensor: the value of this rank.
        reduce_op: how the values of all ranks are combined, in lower case.
        weight: what the rank's mean counts in the step in which that happens; 1 outside of a step.
        stands_in: whether the rank runs that step on a stand-in.
    """
    mean = reduce_op in ("mean", "avg")
    if mean and not tensor.is_floating_point() and not tensor.is_complex():
        # Lightning averages integer counts over ranks and rounds the result down, so a mean over 3 and 4 samples would
        # be divided by 3; see its issue #21859
        tensor = tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
    if stands_in or (mean and weight == 0.0):
        # not a product: the value may be infinite
        return torch.full_like(tensor, _neutral(tensor, reduce_op))
    return tensor * weight if mean and weight != 1.0 else tensor


def _neutral(tensor: Tensor, reduce_op: str) -> float | int:
    """Return the value that changes nothing."""
    if "max" in reduce_op or "min" in reduce_op:
        limits = torch.finfo(tensor.dtype) if tensor.is_floating_point() else torch.iinfo(tensor.dtype)
        return limits.min if "max" in reduce_op else limits.max
    return 1 if "prod" in reduce_op else 0
