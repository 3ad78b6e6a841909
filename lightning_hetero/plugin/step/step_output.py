"""Combine the outputs of a step's micro-batches into the output for the whole mini-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.step.no_terms import weighted

__all__ = ["combined_output", "detached_output", "loss_of"]


def loss_of(output: Any) -> Tensor:
    """Return the loss in the output of a step.

    Raises:
        UnsupportedFeatureError: If there is no loss.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise UnsupportedFeatureError(
            f"A step of several micro-batches needs a loss from each of them, got {type(loss).__name__}. Return a loss"
            f" for every batch, or leave out `micro_batch_size`."
        )
    return loss


def detached_output(output: Any) -> Any:
    """Return the output of a step, detached from its graph."""
    if isinstance(output, Mapping):
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in output.items()}
    return output.detach()


def combined_output(outputs: Sequence[Any], sizes: Sequence[int], weights: Sequence[float]) -> Any:
    """Return the output for the whole mini-batch; only the loss of the last micro-batch has a graph.

    Args:
        outputs: Output of each micro-batch.
        sizes: Number of samples of each micro-batch.
        weights: Weight of the loss of each micro-batch in their sum.
    """
    losses = [weighted(loss_of(output), weight) for output, weight in zip(outputs, weights, strict=True)]
    loss = losses[-1] + sum(losses[:-1])
    last = outputs[-1]
    if not isinstance(last, Mapping):
        return loss
    combined = dict(last)
    for key, value in last.items():
        values = [output.get(key) for output in outputs]
        if isinstance(value, Tensor) and all(
            isinstance(v, Tensor) and v.dim() and len(v) == n for v, n in zip(values, sizes, strict=True)
        ):
            combined[key] = torch.cat([v.detach() for v in values])
    return {**combined, "loss": loss}
