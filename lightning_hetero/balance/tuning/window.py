"""Summarise a window of measured steps in a few numbers that survive outliers and a change in their midst."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, median_low

from lightning_hetero.balance.types import StepTiming, WindowTiming

__all__ = ["summarise"]

# A step that takes this many times as long as is common was disturbed: a checkpoint, a log, autotuning, another job.
_DISTURBED = 4 / 3
# From so many steps on, the slowest and the fastest tenth are left out, and of the others what is more than so many
# standard deviations above the median: one long step that is left in would make the rank seem unsteady for long.
_STEPS_TO_TRIM = 8
_DISTURBED_DEVIATIONS = 5.0
# the standard deviation of normally distributed values over their median absolute deviation
_DEVIATION_OF_MEDIAN = 1.4826
# A window is cut where speed changed by at least this factor and stayed there for so many steps.
_CHANGE = 1.25
_STEPS_OF_CHANGE = 3
_CHANGE_DEVIATIONS = 5.0
_LEAST_DEVIATION = 0.02


def summarise(timings: Sequence[StepTiming]) -> WindowTiming | None:
    """Describe the latest steps of one size and one speed.

    Args:
        timings: measured steps in their order. Steps without samples or without a finite positive time are left out,
            and so are those whose waiting was not finite: no clock that works has measured them.

    Returns:
        The summary, or None where no usable step is left.

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
    # validation and checkpoints lie in the rest of a step, so some of these are long
    waiting_s = median(t.waiting_s if t.waiting_s > 0 else 0.0 for t in same)  # a clock may have been set
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
    """Return where the latest lasting change of speed begins; 0 where there is none."""
    logs = [math.log(value) for value in values]
    for start in range(len(logs) - _STEPS_OF_CHANGE, 1, -1):
        before, after = logs[:start], logs[start:]
        change = abs(fmean(after) - fmean(before))
        squares = sum((x - fmean(part)) ** 2 for part in (before, after) for x in part)
        deviation = max(math.sqrt(squares / (len(logs) - 2)), _LEAST_DEVIATION)
        error = deviation * math.sqrt(1 / len(before) + 1 / len(after))
        if change > math.log(_CHANGE) and change > _CHANGE_DEVIATIONS * error:
            best = max(range(2, len(logs) - _STEPS_OF_CHANGE + 1), key=lambda k: _separation(logs, k))
            return best
    return 0


def _separation(logs: Sequence[float], start: int) -> float:
    """Return how much of the spread a change at ``start`` explains (between-group sum of squares)."""
    before, after = logs[:start], logs[start:]
    return len(before) * len(after) * (fmean(after) - fmean(before)) ** 2
