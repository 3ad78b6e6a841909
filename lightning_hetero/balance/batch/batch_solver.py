r"""Find the integer mini-batch sizes with which the slowest rank finishes as early as possible.

Minimise :math:`\max_r (a_r + c_r n_r)` subject to :math:`\sum_r n_r = B`, :math:`l_r \le n_r \le u_r`, and every
:math:`n_r` a multiple of :math:`m`, except one rank that also takes the remainder :math:`B \bmod m`.

========================  ========================================================
:math:`a_r`, :math:`c_r`  ``step_times[r]``, in seconds and in seconds per sample
:math:`B`                 ``global_batch_size``
:math:`l_r`               ``min_samples``
:math:`u_r`, :math:`m`    ``limits.max_samples``, ``limits.batch_multiple``
========================  ========================================================

The number of samples that a rank can finish within :math:`T` seconds grows with :math:`T`, and it changes only where
:math:`T` is the finishing time of some rank and size.  Bisection narrows an interval until no such time lies inside it,
so it finds the smallest feasible :math:`T` exactly.  Of the plans with that maximum it returns one in which the other
ranks finish early, too.  This is the classic threshold method for min-max allocation with increasing costs (T. Ibaraki
and N. Katoh, *Resource Allocation Problems*, MIT Press 1988, ch. 5).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTime
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

__all__ = ["can_divide", "keeps_limits", "predicted_step_s", "proportional_plan", "solve_batch"]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_NO_LIMITS = BatchLimits()


def predicted_step_s(step_times: Sequence[StepTime], plan: BatchPlan) -> float:
    """Return the seconds that a step takes under ``plan``, which are those of its slowest rank."""
    return max(time.seconds(n) for time, n in zip(step_times, plan.samples, strict=True))


def keeps_limits(plan: BatchPlan, limits: BatchLimits) -> bool:
    """Return whether ``plan`` respects ``limits``."""
    caps = limits.max_samples or plan.samples
    carriers = sum(n % limits.batch_multiple != 0 for n in plan.samples)
    return (
        len(caps) == plan.world_size
        and all(n <= cap for n, cap in zip(plan.samples, caps, strict=True))
        and carriers <= 1
    )


def can_divide(global_batch_size: int, limits: BatchLimits, world_size: int) -> bool:
    """Return whether ``limits``, ``min_samples`` among them, allow for a plan of ``world_size`` ranks."""
    try:
        proportional_plan([1.0] * world_size, global_batch_size, limits, limits.min_samples)
    except InfeasiblePlanError:
        return False
    return True


def solve_batch(
    step_times: Sequence[StepTime],
    global_batch_size: int,
    limits: BatchLimits = _NO_LIMITS,
    min_samples: int | Sequence[int] = 0,
) -> BatchPlan:
    """Divide a global batch so that the slowest rank finishes as early as possible.

    Args:
        step_times: Step time of each rank, shape ``(world_size,)``.
        global_batch_size: Number of samples to divide.
        limits: Limits that the plan must respect.
        min_samples: Fewest samples that a rank gets: one number for all ranks, or one per rank.

    Returns:
        The plan. Equally fast ranks differ by at most one multiple, and the earlier rank has more.

    Raises:
        ConfigurationError: An argument is outside its range.
        InfeasiblePlanError: The limits of the ranks exclude every plan.

    Example:
        >>> solve_batch([StepTime(0.0, 0.001), StepTime(0.0, 0.002)], 96).samples
        (64, 32)
    """
    problem = _Problem(step_times, global_batch_size, limits, min_samples)
    infeasible, feasible = 0.0, problem.least_feasible_upper_bound()
    while infeasible < (middle := infeasible + (feasible - infeasible) / 2) < feasible:
        before, after = problem.finishing_times_around(middle)
        if problem.feasible(middle):
            feasible = before
        elif after < feasible:
            infeasible = middle
        else:
            break
    return BatchPlan(problem.plan_within(feasible))


def proportional_plan(
    shares: Sequence[float],
    global_batch_size: int,
    limits: BatchLimits = _NO_LIMITS,
    min_samples: int | Sequence[int] = 0,
) -> BatchPlan:
    """Divide a global batch in proportion to ``shares``: N and 2N for shares 1 and 2.

    This is :func:`solve_batch` for ranks without overhead, so limits and rounding follow the same rules.

    Args:
        shares: Positive number for each rank, shape ``(world_size,)``.
        global_batch_size: Number of samples to divide.
        limits: Limits that the plan must respect.
        min_samples: Fewest samples that a rank gets, as in :func:`solve_batch`.

    Returns:
        The plan.

    Raises:
        ConfigurationError: An argument is outside its range.
        InfeasiblePlanError: The limits of the ranks exclude every plan.

    Example:
        >>> proportional_plan([1, 2], 96).samples
        (32, 64)
    """
    largest = max(shares)
    return solve_batch([StepTime(0.0, largest / share) for share in shares], global_batch_size, limits, min_samples)


class _Problem:
    """The arguments as arrays, in units of ``batch_multiple`` samples, with the functions that the bisection needs."""

    def __init__(
        self,
        step_times: Sequence[StepTime],
        global_batch_size: int,
        limits: BatchLimits,
        min_samples: int | Sequence[int],
    ) -> None:
        world_size = len(step_times)
        batch_multiple = limits.batch_multiple
        if world_size < 1:
            raise ConfigurationError("`step_times` must have at least one rank, got none.")
        if global_batch_size < 1:
            raise ConfigurationError(f"`global_batch_size` must be positive, got {global_batch_size}.")
        if batch_multiple < 1:
            raise ConfigurationError(f"`batch_multiple` must be positive, got {batch_multiple}.")
        self.overhead: _Floats = np.array([time.overhead_s for time in step_times])
        self.cost: _Floats = np.array([time.seconds_per_sample for time in step_times])
        self.total = global_batch_size
        self.multiple = batch_multiple
        self.units, self.remainder = divmod(global_batch_size, batch_multiple)
        most = global_batch_size if limits.max_samples is None else limits.max_samples
        self.most: _Ints = np.minimum(_per_rank("max_batch_size", most, world_size), global_batch_size)
        # in whole units, because the remainder alone would leave a rank below its minimum
        self.least_units: _Ints = -(-_per_rank("min_samples", min_samples, world_size) // batch_multiple)
        self._check_feasible()

    def _check_feasible(self) -> None:
        most_units = self.most // self.multiple
        if np.any(most_units < self.least_units):
            rank = int(np.argmax(most_units < self.least_units))
            raise InfeasiblePlanError(
                f"`max_batch_size` must leave every rank its minimum of"
                f" {self.least_units[rank] * self.multiple} samples (`batch_multiple`={self.multiple}),"
                f" got {self.most[rank]} for rank {rank}. Raise it."
            )
        if self.least_units.sum() > self.units:
            raise InfeasiblePlanError(
                f"`global_batch_size` must cover the minimum of every rank, together"
                f" {self.least_units.sum() * self.multiple} samples (`batch_multiple`={self.multiple}),"
                f" got {self.total}. Raise it or use fewer devices."
            )
        if not self.feasible(np.inf):
            held = int(most_units.sum()) * self.multiple
            raise InfeasiblePlanError(
                f"`max_batch_size` must together hold the global batch of {self.total} samples, got"
                f" {self.most.tolist()}, which hold {held} in multiples of {self.multiple}: {self.total - held} too"
                f" few. Raise the limits, lower the global batch size to {held}, or use `micro_batch_size`, with which"
                f" ranks process their mini-batch in several micro-batches."
            )

    def least_feasible_upper_bound(self) -> float:
        """Return a time within which every rank reaches its limit."""
        return float(np.max(self.overhead + self.cost * self.most)) * 2 + 1e-9

    def samples_within(self, seconds: float) -> _Ints:
        """Return how many samples each rank finishes within ``seconds``; -1 where even its overhead takes longer."""
        with np.errstate(over="ignore", invalid="ignore"):
            guess = np.floor((seconds - self.overhead) / self.cost)
        samples = np.clip(guess, -1, self.most).astype(np.int64)
        # the division may be off by rounding, so compare finishing times and correct by one sample either way
        samples += (samples < self.most) & (self.overhead + self.cost * (samples + 1) <= seconds)
        samples -= (samples >= 0) & (self.overhead + self.cost * samples > seconds)
        return samples

    def finishing_times_around(self, seconds: float) -> tuple[float, float]:
        """Return the last time up to ``seconds`` and the first time after it at which a rank finishes some size."""
        samples = self.samples_within(seconds)
        before = np.where(samples >= 0, self.overhead + self.cost * samples, 0.0)
        after = np.where(samples < self.most, self.overhead + self.cost * (samples + 1), np.inf)
        return float(before.max()), float(after.min())

    def capacity(self, seconds: float, extra: int = 0) -> _Ints:
        """Return how many units each rank finishes within ``seconds`` if it also takes ``extra`` samples."""
        samples = self.samples_within(seconds)
        units: _Ints = np.maximum((np.maximum(samples, 0) - extra) // self.multiple, -1)
        return np.maximum(units, self.least_units) if extra == 0 else units

    def feasible(self, seconds: float) -> bool:
        """Return whether the ranks finish the global batch within ``seconds``, ignoring ranks at their minimum.

        A rank whose minimum alone takes longer determines the maximum, whatever the others do. Ignoring it lets the
        others finish as early as they can.
        """
        units = self.capacity(seconds)
        if self.remainder == 0:
            return int(units.sum()) >= self.units
        return self._best_carrier(units, self.capacity(seconds, self.remainder)) is not None

    def _best_carrier(self, units: _Ints, units_with_remainder: _Ints) -> int | None:
        """Return the rank that can take the remainder at the smallest loss of units; None if no rank can."""
        loss = units - units_with_remainder
        able = (units_with_remainder >= self.least_units) & (units.sum() - loss >= self.units)
        if not np.any(able):
            return None
        finish = self.overhead + self.cost * (units_with_remainder * self.multiple + self.remainder)
        ranks = np.flatnonzero(able)
        # the rank that loses the fewest units; among equals, the one that finishes first
        return int(ranks[np.lexsort((finish[ranks], loss[ranks]))[0]])

    def plan_within(self, seconds: float) -> tuple[int, ...]:
        """Return a plan that finishes within ``seconds``, which must be feasible."""
        units = self.capacity(seconds)
        extra = np.zeros_like(units)
        if self.remainder:
            with_remainder = self.capacity(seconds, self.remainder)
            carrier = self._best_carrier(units, with_remainder)
            assert carrier is not None  # `seconds` is feasible
            units[carrier] = with_remainder[carrier]
            extra[carrier] = self.remainder
        # the surplus is taken from the rank that would finish last; among equals, from the last rank
        surplus = int(units.sum()) - self.units
        sizes = units * self.multiple + extra
        finish = self.overhead + self.cost * sizes
        able = np.flatnonzero(units > self.least_units)
        # at most as many ranks as surplus units can give one up; a sorted list is a heap
        last = able[np.lexsort((-able, -finish[able]))[:surplus]]
        heap = [(-float(finish[rank]), -int(rank)) for rank in last]
        for _ in range(surplus):
            rank = -heap[0][1]
            units[rank] -= 1
            sizes[rank] -= self.multiple
            if units[rank] > self.least_units[rank]:
                heapq.heapreplace(heap, (-self._rank_finish(rank, int(sizes[rank])), -rank))
            else:
                heapq.heappop(heap)
        return tuple(sizes.tolist())

    def _rank_finish(self, rank: int, samples: int) -> float:
        return float(self.overhead[rank] + self.cost[rank] * samples)


def _per_rank(name: str, value: int | Sequence[int], world_size: int) -> _Ints:
    values = np.full(world_size, value) if isinstance(value, int) else np.array(value)
    if values.shape != (world_size,):
        raise ConfigurationError(f"`{name}` must be one integer, or one per rank ({world_size}), got {value}.")
    if not np.issubdtype(values.dtype, np.integer) or np.any(values < 0):
        raise ConfigurationError(f"`{name}` must be integers that are not negative, got {value}.")
    return values.astype(np.int64)
