"""What the loss of each micro-batch counts in that of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["loss_weights"]


def loss_weights(
    parts: Sequence[Any], sizes: Sequence[int], loss_reduction: str, num_loss_terms: Callable[[Any], int] | None
) -> list[float]:
    """Return one weight per micro-batch, such that the weighted sum of their losses is the loss of all samples.

    Args:
        parts: The micro-batches.
        sizes: Their numbers of samples.
        loss_reduction: "mean" or "sum".
        num_loss_terms: Counts the terms that the loss of a micro-batch averages over; None for its samples.
    """
    if loss_reduction == "sum":
        return [1.0] * len(parts)
    terms = sizes if num_loss_terms is None else [num_loss_terms(part) for part in parts]
    return [n / max(sum(terms), 1) for n in terms]
