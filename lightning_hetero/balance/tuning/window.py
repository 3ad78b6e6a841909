"""Summarise a window of measured steps in a few numbers, robust against outliers and a change of speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, median_low

from lightning_hetero.balance.types import StepTiming, WindowTiming

__all__ = ["summarise"]

# A step this many times as long as the median was disturbed: a checkpoint, logging, autotuning, another job.
_DISTURBED = 4 / 3
# With this many steps or more, the slowest and the fastest tenth are left out, and then every step that is more than
# this many standard deviations above the median: a single long step would make the rank seem unsteady for long.
_STEPS_TO_TRIM = 8
_DISTURBED_DEVIATIONS = 5.0
# the standard deviation of normally distributed values, divided by their median absolute deviation
_DEVIATION_OF_MEDIAN = 1.4826
# A window is cut where the speed changed by at least this factor for at least this many steps.
_CHANGE = 1.25
_STEPS_OF_CHANGE = 3
_CHANGE_DEVIATIONS = 5.0
_MIN_DEVIATION = 0.02


def summarise(timings: Sequence[StepTiming]) -> WindowTiming | None:
    """Summarise the latest steps that have one size and one speed.

    Args:
        timings: Measured steps in their order. Steps without samples are left out, and so are steps whose own time is
            not finite and positive or whose waiting is not finite: no working clock measures such times.

    Returns:
        The summary; None if no usable step is left.

    Example:
        >>> window = summarise([StepTiming(8, t) for t in (0.10, 0.11, 0.09, 0.90)])
        >>> window.steps, round(window.own_s, 3)
        (3, 0.1)
    """
    usable = [t for t in timings if t.samples > 0 and math.isfinite(t.own_s + t.waiting_s) and t.own_s > 0]
    if not usable:
        return None
    samples = usable[-1].samples
    same = [t for t in usable if t.samples == samples]
    same = same[_latest_change([t.own_s for t in same]) :]
    kept = _undisturbed(sorted(t.own_s for t in same))
    mean_s = fmean(kept)
    deviation_s = math.sqrt(sum((s - mean_s) ** 2 for s in kept) / (len(kept) - 1)) if len(kept) > 1 else 0.0
    # validation and checkpoints count as waiting, so a few of these are long
    waiting_s = median(t.waiting_s if t.waiting_s > 0 else 0.0 for t in same)  # the clock may have been changed
    return WindowTiming(samples, len(kept), mean_s, deviation_s, waiting_s)


def _undisturbed(ascending: list[float]) -> list[float]:
    if len(ascending) < _STEPS_TO_TRIM:
        limit = median_low(ascending) * _DISTURBED
        return [s for s in ascending if s <= limit]
    cut = -(-len(ascending) // 10)
    middle = median(ascending)
    spread = _DEVIATION_OF_MEDIAN * median(abs(s - middle) for s in ascending)
    limit = max(middle * _DISTURBED, middle + _DISTURBED_DEVIATIONS * spread)
    return [s for s in ascending[cut:-cut] if s <= limit]


def _latest_change(values: Sequence[float]) -> int:
    """Return the index at which the latest lasting change of speed begins; 0 if there is none."""
    logs = [math.log(value) for value in values]
    for start in range(len(logs) - _STEPS_OF_CHANGE, 1, -1):
        before, after = logs[:start], logs[start:]
        change = abs(fmean(after) - fmean(before))
        squares = sum((x - fmean(part)) ** 2 for part in (before, after) for x in part)
        deviation = max(math.sqrt(squares / (len(logs) - 2)), _MIN_DEVIATION)
        error = deviation * math.sqrt(1 / len(before) + 1 / len(after))
        if change > math.log(_CHANGE) and change > _CHANGE_DEVIATIONS * error:
            best = max(range(2, len(logs) - _STEPS_OF_CHANGE + 1), key=lambda k: _separation(logs, k))
            return best
    return 0


def _separation(logs: Sequence[float], start: int) -> float:
    """Return how much of the spread a change at ``start`` explains (between-group sum of squares)."""
    before, after = logs[:start], logs[start:]
    return len(before) * len(after) * (fmean(after) - fmean(before)) ** 2
