"""Say which layers move between ranks when stages change, and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["HasLayers", "LayerMove", "layer_moves", "moving_s"]


class HasLayers(Protocol):
    """The stages of a pipeline, or of several."""

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""

    def owners_of(self, layer: int) -> tuple[int, ...]:
        """Return the ranks that hold a layer, in ascending order."""

    def nearest(self, owners: Sequence[int], rank: int) -> int:
        """Return which of some owners gives a rank what it has not got."""


@dataclass(frozen=True)
class LayerMove:
    """A layer that moves from one rank to another, or that one more rank gets.

    Attributes:
        layer: Index of the layer.
        source: Rank that has the layer: the first one if several have it, or one of the same replica.
        target: Rank that gets it.
    """

    layer: int
    source: int
    target: int


def layer_moves(before: HasLayers, after: HasLayers) -> tuple[LayerMove, ...]:
    """Return the moves that lead from one plan to another, in the order of layers.

    Example:
        >>> from lightning_hetero.balance.pipeline.stages import StagePlan
        >>> layer_moves(StagePlan((1, 0), (2, 6)), StagePlan((1, 0), (3, 6)))
        (LayerMove(layer=2, source=0, target=1),)
    """
    return tuple(
        LayerMove(layer, before.nearest(had, rank), rank)
        for layer in range(before.num_layers)
        for had in [before.owners_of(layer)]
        for rank in after.owners_of(layer)
        if rank not in had
    )


def moving_s(before: HasLayers, after: HasLayers, layers_s: Sequence[float]) -> float:
    """Return the seconds that it takes to change from one plan to another, one layer after the other.

    Args:
        before: The plan to leave.
        after: The plan to change to.
        layers_s: Seconds that each layer takes to move, with its gradients and the state of its optimiser.
    """
    return sum(layers_s[move.layer] for move in layer_moves(before, after))
