"""Compute the weight of each micro-batch in the loss of all samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["loss_weights"]


def loss_weights(
    parts: Sequence[Any], sizes: Sequence[int], loss_reduction: str, num_loss_terms: Callable[[Any], int] | None
) -> list[float]:
    """Return one weight per micro-batch with which the weighted sum of their losses is the loss of all samples.

    Args:
        parts: The micro-batches.
        sizes: Number of samples in each micro-batch.
        loss_reduction: How the loss is reduced over a micro-batch, "mean" or "sum".
        num_loss_terms: Function that counts the terms over which the loss of a micro-batch is averaged; None for its
            samples.
    """
    if loss_reduction == "sum":
        return [1.0] * len(parts)
    terms = sizes if num_loss_terms is None else [num_loss_terms(part) for part in parts]
    return [n / max(sum(terms), 1) for n in terms]
