"""Search the devices of a cluster for the fastest set, and for the set whose samples cost least.

Devices of one kind are interchangeable, so a set is a number of devices of each kind.  Many sets are evaluated at once,
one per row of an array.  For each set, the shortest time of the slowest device is found by bisection, as in
:mod:`~lightning_hetero.balance.batch.batch_solver`, but without expanding kinds into ranks.

- *Fastest.* More devices mean more messages in the ring; fewer devices mean more work for each.  So the search finds
  the best set of every size: the devices that finish most samples within a time.  It tries sizes on a grid, which it
  refines around the best one.
- *Cheapest.* For each of many times, the search takes the devices with the lowest price per sample until they finish
  the batch within that time.  It then improves the best sets by single moves.  This is a heuristic, because the problem
  is a knapsack problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import permutations

import numpy as np
import numpy.typing as npt

from lightning_hetero.command.plan.cluster import Cluster

__all__ = ["DeviceSearch"]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
Counts = tuple[int, ...]

_HALVINGS = 60
_GRID, _COARSE_GRID = 200, 40
_MAX_MOVES = 100
_STARTS = 3
_FEW_KINDS, _MANY_KINDS = 12, 50


class DeviceSearch:
    """The devices of a cluster as arrays, with one entry per kind.

    Args:
        cluster: Cluster whose devices are searched.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._multiple = cluster.batch_multiple
        self._counts: _Ints = np.array([kind.count for kind in cluster.kinds])
        self._overhead: _Floats = np.array([kind.step_time.overhead_s for kind in cluster.kinds])
        self._cost: _Floats = np.array([kind.step_time.seconds_per_sample for kind in cluster.kinds])
        self._price: _Floats = np.array([kind.price_per_hour or 0.0 for kind in cluster.kinds])
        self._most: _Ints = np.array(cluster.most_samples) // self._multiple
        # the remainder counts as a full multiple here, so a set may seem unable to hold a batch that it just can
        self._units = -(-cluster.global_batch_size // self._multiple)
        self._most_devices = cluster.global_batch_size // self._multiple
        many = len(cluster.kinds) > _MANY_KINDS
        self._grid, self._rounds = (_COARSE_GRID, 0) if many else (_GRID, _MAX_MOVES)

    def own_s(self, counts: _Ints) -> _Floats:
        """Return the shortest time of the slowest device of each set; infinite if the set cannot hold the batch.

        Args:
            counts: Number of devices of each kind in each set, shape ``(sets, kinds)``.
        """
        used = counts > 0

        def feasible(seconds: _Floats) -> npt.NDArray[np.bool_]:
            held = np.minimum(np.maximum(self._units_within(seconds), 1), self._most)
            return np.asarray((counts * held).sum(axis=1) >= self._units)

        seconds = self._bisect(feasible, len(counts))
        # the bisection ends slightly late; the last finishing time of a device up to there is exact
        units = np.clip(self._units_within(seconds), 1, self._most)
        own_s: _Floats = np.max(np.where(used, self._finish(units), 0.0), axis=1)
        sizes = counts.sum(axis=1)
        possible = (counts * self._most).sum(axis=1) >= self._units
        return np.where(possible & (sizes > 0) & (sizes <= self._most_devices), own_s, np.inf)

    def step_s(self, counts: _Ints) -> _Floats:
        """Return the seconds per step of each set, including communication."""
        own_s = self.own_s(counts)
        return np.array(
            [
                self._cluster.all_reduce.step_s(own, int(size)) if np.isfinite(own) else np.inf
                for own, size in zip(own_s.tolist(), counts.sum(axis=1), strict=True)
            ]
        )

    def fastest(self, tolerance: float = 0.0) -> Counts:
        """Return the set with the shortest step; of equal ones, the largest.

        Args:
            tolerance: Fraction by which a step may be longer if all devices of a kind are used instead of some.
        """
        low, high = 1, min(int(self._counts.sum()), self._most_devices)
        while True:
            sizes = np.unique(np.linspace(low, high, min(self._grid, high - low + 1)).round().astype(np.int64))[::-1]
            counts = self._best_of_sizes(sizes)
            step_s = self.step_s(counts)
            best = int(np.argmin(step_s))
            low, high = int(sizes[min(best + 1, len(sizes) - 1)]), int(sizes[max(best - 1, 0)])
            if high - low <= 2 or len(sizes) < self._grid:
                break
        found = counts[best]
        for kind in np.flatnonzero(found < self._counts) if tolerance else ():
            whole = found.copy()
            whole[kind] = self._counts[kind]
            if self.step_s(whole[None])[0] <= step_s[best] * (1 + tolerance):
                found = whole
        return tuple(found.tolist())

    def cheapest(self) -> Counts:
        """Return the cheapest set per sample that was found; of equal ones, the one with the shorter step."""
        low_s, high_s = float(self._finish(np.ones_like(self._most)).min()), float(self._finish(self._most).max())
        times = np.geomspace(max(low_s, high_s * 1e-9), high_s, self._grid)
        found = np.vstack([self._cheap_within(times), np.diag(self._counts), np.eye(len(self._counts)), self._counts])
        ranked = sorted(self._evaluate(found.astype(np.int64)))[:_STARTS]
        improved = (self._improve(one) for one in ranked)
        return min(improved)[-1]

    def _improve(self, best: tuple[float, float, Counts]) -> tuple[float, float, Counts]:
        for _ in range(self._rounds):
            candidate = min(self._evaluate(self._moves(best[-1])))
            if candidate[:2] >= best[:2]:
                break
            best = candidate
        return best

    def _evaluate(self, counts: _Ints) -> Iterable[tuple[float, float, Counts]]:
        step_s = self.step_s(counts)
        # a set that cannot hold the batch costs infinitely much, even if its devices are free
        cost = np.where(
            np.isfinite(step_s), np.where(np.isfinite(step_s), step_s, 0.0) * (counts @ self._price), np.inf
        )
        # in single precision, costs that differ only by rounding are equal, and the shorter step decides
        return zip(cost.astype(np.float32).tolist(), step_s.tolist(), map(tuple, counts.tolist()), strict=True)

    def _moves(self, counts: Counts) -> _Ints:
        """Return ``counts`` and the sets that differ in the number of one kind, or in one exchanged device."""
        kinds = range(len(counts))
        found = {counts: None}
        for kind in kinds:
            few = max(counts[kind] // 20, 2)
            for number in (0, 1, *(counts[kind] + step for step in (-few, -1, 1, few)), int(self._counts[kind])):
                if 0 <= number <= self._counts[kind]:
                    other = (*counts[:kind], number, *counts[kind + 1 :])
                    found[other] = None
        if len(counts) <= _FEW_KINDS:
            for less, more in permutations(kinds, 2):
                if counts[less] and counts[more] < self._counts[more]:
                    found[tuple(n - (k == less) + (k == more) for k, n in enumerate(counts))] = None
        return np.array(list(found))

    def _cheap_within(self, times: _Floats) -> _Ints:
        """Return, for each time, the devices that finish the batch within it at the lowest price per sample."""
        held = np.clip(self._units_within(times), 0, self._most)
        with np.errstate(divide="ignore"):
            price = np.where(held > 0, self._price / held, np.inf)
        # of equal prices, the device that holds more comes first
        order = np.lexsort((-held, price), axis=1)
        held, most = np.take_along_axis(held, order, 1), self._counts[order]
        before = np.cumsum(held * most, axis=1) - held * most
        needed = np.maximum(-(-(self._units - before) // np.maximum(held, 1)), 0)
        taken = np.where(held > 0, np.minimum(needed, most), 0)
        counts = np.empty_like(taken)
        np.put_along_axis(counts, order, taken, 1)
        return counts

    def _best_of_sizes(self, sizes: _Ints) -> _Ints:
        """Return, for each size, the set of that many devices that finishes the batch first."""

        def counts_within(seconds: _Floats) -> tuple[_Ints, _Ints]:
            held = np.clip(self._units_within(seconds), 0, self._most)
            order = np.argsort(-held, axis=1, kind="stable")
            most = np.where(np.take_along_axis(held, order, 1) > 0, self._counts[order], 0)
            before = np.cumsum(most, axis=1) - most
            counts = np.empty_like(held)
            np.put_along_axis(counts, order, np.clip(sizes[:, None] - before, 0, most), 1)
            return counts, held

        def feasible(seconds: _Floats) -> npt.NDArray[np.bool_]:
            counts, held = counts_within(seconds)
            return np.asarray((counts.sum(axis=1) == sizes) & ((counts * held).sum(axis=1) >= self._units))

        return counts_within(self._bisect(feasible, len(sizes)))[0]

    def _bisect(self, feasible: Callable[[_Floats], npt.NDArray[np.bool_]], rows: int) -> _Floats:
        low, high = np.zeros(rows), np.full(rows, 2 * float(self._finish(self._most).max()))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = feasible(middle)
            high = np.where(enough, middle, high)
            low = np.where(enough, low, middle)
        return high

    def _finish(self, units: _Ints) -> _Floats:
        return self._overhead + self._cost * (units * self._multiple)

    def _units_within(self, seconds: _Floats) -> _Ints:
        """Return how many multiples a device of each kind finishes within each time, shape ``(times, kinds)``."""
        units = np.floor((seconds[:, None] - self._overhead) / (self._cost * self._multiple))
        units = np.clip(units, 0, self._most).astype(np.int64)
        # the division may be off by rounding, so compare finishing times
        units += (units < self._most) & (self._finish(units + 1) <= seconds[:, None])
        units -= (units > 0) & (self._finish(units) > seconds[:, None])
        return units
