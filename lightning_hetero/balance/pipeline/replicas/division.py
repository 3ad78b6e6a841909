"""Divide the samples of a step among replicas so that the slowest one ends as early as possible.

The time of a replica grows with its samples, but it need not be a line: the best stages change, a replica with few
samples has fewer micro-batches, and memory sets a limit. So lines through two points near the latest division give the
next one (``batch_solver``), until it stays the same. Then single samples move from the slowest replica to others as
long as the slowest one gets faster. Where no such move helps, no other division is better: it would give another
replica more samples than now, and that one would end no earlier than the slowest does now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isfinite

from lightning_hetero.balance.batch.batch_solver import solve_batch
from lightning_hetero.balance.types import BatchLimits, StepTime
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["divide_samples"]

_ROUNDS = 8
_APART = 8  # the second point of a line is this part of the samples away
_MOVES = 200


def divide_samples(
    step_s: Sequence[Callable[[int], float]], samples: int, start: Sequence[float]
) -> tuple[int, ...] | None:
    """Return the samples of each replica, at least one; None if they have no memory for all.

    Args:
        step_s: For each replica, a function that returns the seconds of a step with some samples; infinity if they do
            not fit.
        samples: Samples to divide, at least one per replica.
        start: Positive first guess of each replica's share.
    """
    if len(step_s) == 1:
        return (samples,) if isfinite(step_s[0](samples)) else None
    limits = tuple(_most(of_replica, samples - len(step_s) + 1) for of_replica in step_s)
    if min(limits) < 1 or sum(limits) < samples:
        return None
    bounds = BatchLimits(max_samples=limits)
    found = solve_batch([StepTime(0.0, max(start) / s) for s in start], samples, bounds, 1).samples
    seen = [found]
    for _ in range(_ROUNDS):
        lines = [_line(of_replica, n, most) for of_replica, n, most in zip(step_s, found, limits, strict=True)]
        try:
            found = solve_batch(lines, samples, bounds, 1).samples
        except InfeasiblePlanError:  # pragma: no cover - limits were checked
            return None
        if found in seen:
            break
        seen.append(found)
    best = min(seen, key=lambda division: max(of(n) for of, n in zip(step_s, division, strict=True)))
    return _exchanged(step_s, list(best))


def _most(step_s: Callable[[int], float], samples: int) -> int:
    """Return the most samples, up to some number, that fit; 0 if not even one does."""
    if isfinite(step_s(samples)):
        return samples
    fits, too_many = 0, samples
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if isfinite(step_s(middle)):
            fits = middle
        else:
            too_many = middle
    return fits


def _line(step_s: Callable[[int], float], samples: int, most: int) -> StepTime:
    """Return the line through the times for some samples and for some more, or fewer if no more fit."""
    other = samples + max(samples // _APART, 1)
    if other > most:
        other = max(samples - max(samples // _APART, 1), 1)
    here_s, there_s = step_s(samples), step_s(other)
    slope = (there_s - here_s) / (other - samples) if other != samples else here_s / samples
    if slope <= 0 or here_s - slope * samples < 0:
        slope = here_s / samples
    if slope <= 0:
        return StepTime(0.0, 1e-12)
    return StepTime(max(here_s - slope * samples, 0.0), slope)


def _exchanged(step_s: Sequence[Callable[[int], float]], division: list[int]) -> tuple[int, ...]:
    for _ in range(_MOVES):
        times = [of_replica(n) for of_replica, n in zip(step_s, division, strict=True)]
        slowest = max(range(len(times)), key=times.__getitem__)
        if division[slowest] == 1:
            break
        after = [inf if i == slowest else step_s[i](division[i] + 1) for i in range(len(times))]
        taker = min(range(len(after)), key=after.__getitem__)
        if after[taker] >= times[slowest] * (1 - 1e-12):
            break
        division[slowest] -= 1
        division[taker] += 1
    return tuple(division)
