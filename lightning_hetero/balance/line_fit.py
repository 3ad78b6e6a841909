r"""Fit the line ``overhead + cost * n`` to repeated timings of several sizes.

The repetitions of each size are reduced to their median, which a single disturbed repetition does not move.  The line
minimises the squared relative errors of these medians under the constraint that the overhead is not negative:
non-negative least squares (C. Lawson and R. Hanson, *Solving Least Squares Problems*, 1974, chapter 23).  With two
unknowns the solution is the unconstrained one or lies on the boundary.  Errors are relative because disturbances grow
with the length of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median, quantiles

import numpy as np

from lightning_hetero.balance.types import StepTime
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["fit_line", "relative_spread"]

_MIN_SIZES = 3
# A slope below this fraction of the proportional one is not trusted: it would give a device ever more samples.
_MIN_SLOPE = 0.05


def fit_line(timings: Mapping[int, Sequence[float]]) -> StepTime:
    """Return the line through the medians of repeated timings.

    Args:
        timings: Seconds of each repetition, keyed by the number of samples; at least three sizes with at least one
            repetition each. Sizes and times must be positive.

    Raises:
        ConfigurationError: There are fewer than three sizes, or a size or a time is not positive.

    Example:
        >>> fit_line({10: [1.5, 1.5, 9.0], 20: [2.5], 40: [4.5]})
        StepTime(overhead_s=0.5, seconds_per_sample=0.1)
    """
    if len(timings) < _MIN_SIZES or not all(timings.values()):
        raise ConfigurationError(
            f"`timings` must have at least {_MIN_SIZES} sizes with at least one time each, got {dict(timings)}."
        )
    sizes = np.array(sorted(timings), dtype=np.float64)
    seconds = np.array([median(timings[size]) for size in sorted(timings)])
    if sizes[0] <= 0 or not all(np.isfinite(seconds)) or min(seconds) <= 0:
        raise ConfigurationError(f"`timings` must have positive sizes and times, got {dict(timings)}.")
    # each equation is divided by its time: ones = overhead * u + cost * v
    u, v = 1 / seconds, sizes / seconds
    least_cost = _MIN_SLOPE * seconds[-1] / sizes[-1]
    (overhead, cost), *_ = np.linalg.lstsq(np.stack([u, v], axis=1), np.ones(len(sizes)), rcond=None)
    if overhead < 0:
        overhead, cost = 0.0, v.sum() / (v @ v)
    if cost < least_cost:
        overhead, cost = max(u @ (1 - least_cost * v) / (u @ u), 0.0), least_cost
    return StepTime(float(f"{overhead:.6g}"), float(f"{cost:.6g}"))


def relative_spread(seconds: Sequence[float]) -> float:
    """Return the interquartile range of repeated timings divided by their median; 0 for a single timing."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle
