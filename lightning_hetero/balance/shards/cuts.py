"""Cut the parameters of a unit into one contiguous range per rank, in proportion to the ranks' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from lightning_hetero.exceptions import ConfigurationError

__all__ = ["Cuts", "Cutter"]


@dataclass(frozen=True)
class Cuts:
    """The ranges of the ranks in a row of numbers.

    Attributes:
        bounds: Where the ranges begin and end: rank r holds the numbers from ``bounds[r]`` to ``bounds[r + 1]``.
    """

    bounds: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each rank holds."""
        return tuple(end - begin for begin, end in pairwise(self.bounds))

    def range_of(self, rank: int) -> tuple[int, int]:
        """Return the first number of ``rank`` and the first one after its last."""
        return self.bounds[rank], self.bounds[rank + 1]

    def within(self, begin: int, end: int) -> tuple[int, ...]:
        """Return how many of the numbers from ``begin`` to ``end`` each rank holds."""
        return tuple(max(0, min(b, end) - max(a, begin)) for a, b in pairwise(self.bounds))


class Cutter:
    """Cuts one unit after the other, and makes up for what rounding has given to a rank too much.

    Over all units together each rank holds what its weight says, to within one number. A rank of weight zero holds
    nothing.

    Args:
        weights: One weight per rank, none negative and at least one positive.

    Raises:
        ConfigurationError: The weights break that rule.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ConfigurationError(f"Weights of shards must be positive or zero, and not all zero, got {weights}.")
        exact = [Fraction(weight) for weight in weights]
        self._parts = [weight / sum(exact) for weight in exact]
        self._owed = [Fraction(0)] * len(exact)  # bytes

    def cut(self, total: int, bytes_per_number: int = 1) -> Cuts:
        """Return the ranges of all ranks in a unit.

        Args:
            total: How many numbers the unit has.
            bytes_per_number: Size of a number. What is made up for in a later unit is counted in bytes.
        """
        wanted = [total * part + owed / bytes_per_number for part, owed in zip(self._parts, self._owed, strict=True)]
        bounds = [0]
        for end in list(accumulate(wanted))[:-1]:
            bounds.append(min(max(round(end), bounds[-1]), total))
        cuts = Cuts((*bounds, total))
        if cuts.sizes[-1] and not self._parts[-1]:  # what others are owed in total may exceed the unit
            last = max(rank for rank, part in enumerate(self._parts) if part)
            cuts = Cuts((*cuts.bounds[: last + 1], *[total] * (len(bounds) - last)))
        for rank, (part, size) in enumerate(zip(self._parts, cuts.sizes, strict=True)):
            self._owed[rank] += (total * part - size) * bytes_per_number
        return cuts
