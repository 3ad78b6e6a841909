"""Where a rank is in its program, and what to say of ranks that are at different points of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Place", "why_different", "why_stuck"]

_PASSES = {
    "train": "forward pass of training step",
    "backward": "backward pass of training step",
    "end": "end of training step",
    "hook": "hook that uses the model after step",
    "saving": "saving after step",
}
_NAMES = [*_PASSES.values(), "evaluation step"]
_KINDS = [*_PASSES]


class Place(NamedTuple):
    """A pass; what must be equal on all ranks in their n-th pass.

    Attributes:
        kind: Number of the kind of pass.
        step: Number of the step.
        number: Number of the pass in the step.
        trained: Hash of which parameters are trained; 0 where that does not matter.
    """

    kind: int
    step: int
    number: int
    trained: int

    @classmethod
    def of(cls, kind: str, step: int, number: int, trained: int = 0) -> Place:
        """Return a place.

        Args:
            kind: "train", "backward", "end" for that of a training step, "hook", "saving", or anything else for an
                evaluation.
            step: Number of the step.
            number: Number of the pass in it.
            trained: Hash of which parameters are trained.
        """
        return cls(_KINDS.index(kind) if kind in _PASSES else len(_KINDS), step, number, trained)

    @property
    def is_hook(self) -> bool:
        """Whether a hook uses the model."""
        return self.kind == _KINDS.index("hook")

    def __str__(self) -> str:
        """Return the place in words."""
        return f"{_NAMES[self.kind]} {self.step}"


def why_different(places: Mapping[int, Place]) -> str:
    """Return what to say of ranks that are not at the same place, by rank."""
    if len({place[:3] for place in places.values()}) == 1:
        return "the ranks train different parameters. Freeze the same parameters on all ranks"
    where = ", ".join(f"rank {rank} in the {place}" for rank, place in sorted(places.items()))
    return (
        f"the ranks are at different points of the program: {where}. All ranks must run the same passes: do not leave a"
        f" backward pass out on some of them (a loss of zero, `0 * loss`, does the same), and use the model in hooks on"
        f" all ranks or on none"
    )


def why_stuck(first: Mapping[int, Place], others: Mapping[int, Place]) -> str:
    """Return what to say of ranks that wait for each other, by rank.

    Args:
        first: Those that have begun a pass.
        others: Those that have not, and wait for other ranks.
    """
    late = ", ".join(map(str, sorted(others)))
    if any(place.is_hook for place in first.values()):
        return (
            f"a hook uses the model on rank {', '.join(map(str, sorted(first)))}, but not on all others: rank {late}"
            f" waits for other ranks elsewhere. The ranks gather its parameters together, so use it on all of them or"
            f" on none: leave `rank_zero_only` out"
        )
    where = ", ".join(f"rank {rank} in the {place}" for rank, place in sorted(first.items()))
    return (
        f"the ranks wait for each other at different points of the program: {where}, which gathers parameters from all"
        f" ranks, and rank {late} in another collective. Call collectives at the same point on all ranks"
    )
