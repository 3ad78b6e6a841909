"""Combine the outputs of a step's micro-batches into the output for the whole mini-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.distributed.pipeline.structure import mapped, tensors_of
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.step.no_terms import weighted

__all__ = [
    "can_be_joined",
    "combined_output",
    "detached_output",
    "joined_output",
    "loss_of",
    "sizes_of_micro_batches",
]


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


def sizes_of_micro_batches(samples: int, micro_batches: int, least: int = 1) -> list[int]:
    """Return the sizes of the micro-batches, which differ by at most one.

    Args:
        samples: Number of samples in the batch.
        micro_batches: Maximum number of micro-batches.
        least: Minimum size of each micro-batch, if the batch has that many samples.
    """
    count = max(min(micro_batches, samples // least), 1)
    size, larger = divmod(samples, count)
    return [size + 1] * larger + [size] * (count - larger)


def can_be_joined(outputs: Sequence[Any], sizes: Sequence[int]) -> bool:
    """Return whether the outputs of micro-batches have one entry per sample, and are otherwise the same."""
    first: list[Any] = []
    for output, size in zip(outputs, sizes, strict=True):
        leaves: list[Any] = []
        mapped(output, leaves.append)
        if any(isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != size) for leaf in leaves):
            return False
        kinds = [(leaf.dtype, leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if not first:
            first = kinds
        elif len(kinds) != len(first) or any(a is not b and a != b for a, b in zip(kinds, first, strict=True)):
            return False
    return True


def joined_output(outputs: Sequence[Any]) -> Any:
    """Return the output for the whole batch, joined from the outputs of its micro-batches."""
    if len(outputs) == 1:
        return outputs[0]
    parts = zip(*map(tensors_of, outputs), strict=True)
    return mapped(outputs[0], lambda leaf: torch.cat(next(parts)) if isinstance(leaf, Tensor) else leaf)
