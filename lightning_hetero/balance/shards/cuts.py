"""Cut the parameters of a unit into one contiguous range per rank, in proportion to the ranks' weights."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
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

    Over all units together each rank holds what its weight says, to within one number; with whole parameters, to within
    about one parameter. A rank of weight zero holds nothing.

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

    def cut(self, sizes: Sequence[int], bytes_per_number: int = 1, *, whole: bool = False) -> Cuts:
        """Return the ranges of all ranks in a unit.

        Args:
            sizes: How many numbers each parameter of the unit has, in the order in which they lie.
            bytes_per_number: Size of a number. What is made up for in a later unit is counted in bytes.
            whole: Whether a parameter must not be cut, so that one rank holds all of it.
        """
        total = sum(sizes)
        wanted = [total * part + owed / bytes_per_number for part, owed in zip(self._parts, self._owed, strict=True)]
        allowed = [0, *accumulate(sizes)] if whole else None
        bounds = [0]
        for end in list(accumulate(wanted))[:-1]:
            cut = round(end) if allowed is None else _nearest(allowed, end)
            bounds.append(min(max(cut, bounds[-1]), total))
        cuts = Cuts((*bounds, total))
        if cuts.sizes[-1] and not self._parts[-1]:  # what others are owed in total may exceed the unit
            last = max(rank for rank, part in enumerate(self._parts) if part)
            cuts = Cuts((*cuts.bounds[: last + 1], *[total] * (len(bounds) - last)))
        for rank, (part, size) in enumerate(zip(self._parts, cuts.sizes, strict=True)):
            self._owed[rank] += (total * part - size) * bytes_per_number
        return cuts

    def cut_all(self, units: Iterable[tuple[Sequence[int], int]], *, whole: bool = False) -> list[Cuts]:
        """Return the ranges in several units, each given as its sizes and bytes per number."""
        return [self.cut(sizes, bytes_per_number, whole=whole) for sizes, bytes_per_number in units]


def _nearest(allowed: Sequence[int], wanted: Fraction) -> int:
    index = bisect_left(allowed, wanted)
    return min(allowed[max(index - 1, 0) : index + 1], key=lambda bound: abs(bound - wanted))
