"""Say which layers move between ranks when the stages of a pipeline change, and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.pipeline.stages import StagePlan

__all__ = ["LayerMove", "layer_moves", "moving_s"]


@dataclass(frozen=True)
class LayerMove:
    """A layer that moves from one rank to another.

    Attributes:
        layer: Index of the layer.
        source: Rank that has the layer.
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
    old, new = _rank_of_layers(before), _rank_of_layers(after)
    return tuple(LayerMove(i, a, b) for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)


def moving_s(before: StagePlan, after: StagePlan, layers_s: Sequence[float]) -> float:
    """Return the seconds that it takes to change from one plan to another, one layer after the other.

    Args:
        before: The plan to leave.
        after: The plan to change to.
        layers_s: Seconds that each layer takes to move, with its gradients and the state of its optimiser.
    """
    return sum(layers_s[move.layer] for move in layer_moves(before, after))


def _rank_of_layers(plan: StagePlan) -> list[int]:
    return [rank for stage, rank in enumerate(plan.ranks) for _ in plan.layers(stage)]
