"""Compute the weight of each rank's loss in the mean over ranks, and of each micro-batch's in that of its rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_hetero.balance.types import weight_in_mean
from lightning_hetero.distributed.collectives import all_gather_numbers
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["loss_weights", "weight_of_rank"]


def loss_weights(
    parts: Sequence[Any], sizes: Sequence[int], loss_reduction: str, num_loss_terms: Callable[[Any], float] | None
) -> list[float]:
    """Return one weight per micro-batch with which the weighted sum of their losses is the loss of all samples.

    Args:
        parts: The micro-batches.
        sizes: Number of samples in each micro-batch.
        loss_reduction: How the loss is reduced over a micro-batch, "mean" or "sum".
        num_loss_terms: Function that counts the terms over which the loss of a micro-batch is averaged; None for its
            samples.

    Returns:
        The weights; all of them are 0 if no micro-batch has a term.

    Raises:
        ConfigurationError: ``num_loss_terms`` returns no number, or one that cannot count terms.
    """
    if loss_reduction == "sum":
        return [1.0] * len(parts)
    if num_loss_terms is None:
        return [n / max(sum(sizes), 1) for n in sizes]
    terms = [_number_of_terms(num_loss_terms, part) for part in parts]
    for number, n in enumerate(terms):
        _check_terms(n, f"for micro-batch {number} of {len(parts)}")
    return [weight_in_mean(n, sum(terms), 1) for n in terms]


def weight_of_rank(num_loss_terms: Callable[[Any], float], batch: Any, *, stands_in: bool) -> float:
    """Return the weight of this rank's loss with which the mean over ranks is the mean over all terms.

    Every rank must call this at the same point. The ranks exchange their numbers of terms in one small all-reduce. If
    one of them is invalid, or its function raises, every rank raises.

    Args:
        num_loss_terms: Function that counts the terms over which the loss of a batch is averaged.
        batch: This rank's mini-batch.
        stands_in: Whether the batch is a stand-in, which has no terms.

    Returns:
        The weight; 0 on all ranks if none has a term.

    Raises:
        ConfigurationError: ``num_loss_terms`` returns no number, or one that cannot count terms.
    """
    terms, error = 0.0, None
    try:
        terms = 0.0 if stands_in else _number_of_terms(num_loss_terms, batch)
    except Exception as raised:
        terms, error = math.nan, raised  # the other ranks wait for a number
    of_ranks = all_gather_numbers(terms)
    if error is not None:
        raise error
    for rank, n in enumerate(of_ranks):
        _check_terms(n, f"on rank {rank}", " (or an error, which that rank reports)" if math.isnan(n) else "")
    return weight_in_mean(terms, sum(of_ranks), len(of_ranks))


def _number_of_terms(num_loss_terms: Callable[[Any], float], batch: Any) -> float:
    terms = num_loss_terms(batch)
    try:
        if isinstance(terms, str | bytes):
            raise TypeError
        return float(terms)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        shape = f" of shape {tuple(terms.shape)}" if isinstance(terms, torch.Tensor) else ""
        raise ConfigurationError(
            f"`num_loss_terms` must return one number, got a {type(terms).__name__!r}{shape}. Return the number of"
            f" terms over which the loss of the batch is averaged, for example `mask.sum()`."
        ) from None


def _check_terms(terms: float, where: str, remark: str = "") -> None:
    if not (math.isfinite(terms) and terms >= 0):
        raise ConfigurationError(
            f"`num_loss_terms` must return a finite number that is not negative, got {terms}{remark} {where}. Return"
            f" the number of terms over which the loss of the batch is averaged, or the sum of their weights."
        )
