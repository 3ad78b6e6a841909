"""What the steps of several passes return becomes what one step would have returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["combined_output", "detached_output", "loss_of"]


def loss_of(output: Any) -> Tensor:
    """Return the loss among what a step returns.

    Raises:
        UnsupportedFeatureError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise UnsupportedFeatureError(
            f"A step that runs in several passes needs a loss from each of them, got {type(loss).__name__}. Return a"
            f" loss for every batch, or leave `micro_batch_size` out."
        )
    return loss


def detached_output(output: Any) -> Any:
    """Return what a step has returned, without the graph behind it."""
    if isinstance(output, Mapping):
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in output.items()}
    return output.detach()


def combined_output(outputs: Sequence[Any], sizes: Sequence[int], weights: Sequence[float]) -> Any:
    """Return what the step would have returned in one pass; only the last pass's loss has a graph.

    Args:
        outputs: of each pass.
        sizes: its samples.
        weights: what its loss counts in that of all of them.
    """
    losses = [loss_of(output) * weight for output, weight in zip(outputs, weights, strict=True)]
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
