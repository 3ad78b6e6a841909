"""Say which layers move between ranks when the stages of a pipeline change, and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.pipeline.stages import StagePlan

__all__ = ["LayerMove", "layer_moves", "moving_s"]


@dataclass(frozen=True)
class LayerMove:
    """A layer that moves from one rank to another, or that a second rank gets too.

    Attributes:
        layer: Index of the layer.
        source: Rank that has the layer, the first one if two have it.
        target: Rank that gets it.
    """

    layer: int
    source: int
    target: int


def layer_moves(before: StagePlan, after: StagePlan) -> tuple[LayerMove, ...]:
    """Return the moves that lead from one plan to another, in the order of layers.

    Example:
        >>> layer_moves(StagePlan((1, 0), (2, 6)), StagePlan((1, 0), (3, 6)))
        (LayerMove(layer=2, source=0, target=1),)
    """
    old, new = _ranks_of_layers(before), _ranks_of_layers(after)
    return tuple(
        LayerMove(i, had[0], rank)
        for i, (had, has) in enumerate(zip(old, new, strict=True))
        for rank in has
        if rank not in had
    )


def moving_s(before: StagePlan, after: StagePlan, layers_s: Sequence[float]) -> float:
    """Return the seconds that it takes to change from one plan to another, one layer after the other.

    Args:
        before: The plan to leave.
        after: The plan to change to.
        layers_s: Seconds that each layer takes to move, with its gradients and the state of its optimiser.
    """
    return sum(layers_s[move.layer] for move in layer_moves(before, after))


def _ranks_of_layers(plan: StagePlan) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(plan.num_layers)]
    for rank in range(plan.world_size):
        for layer in plan.layers_of(rank):
            if rank not in found[layer]:
                found[layer].append(rank)
    return found
