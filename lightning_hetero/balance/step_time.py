r"""Fit ``seconds = overhead + cost * samples`` to the measured steps of one rank.

The straight line is the one that passes through the mean of the measured sizes and has the slope

.. math:: c = \frac{\hat c / \sigma^2 + c_0 / \sigma_0^2}{1 / \sigma^2 + 1 / \sigma_0^2}

with :math:`\hat c` the least-squares slope between the sizes, :math:`\sigma` its standard error, and :math:`c_0` the
slope of the line through the origin with :math:`\sigma_0 = c_0 / 2`: a normal prior that says "proportional" until
the measurements say otherwise (the conjugate estimate of, for example, C. Bishop, *Pattern Recognition and Machine
Learning*, Springer 2006, section 3.3).  With one size measured the answer is exactly proportional; with two that
differ by a few per cent it is the data's as far as the noise lets them speak.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.types import StepTime, StepTiming
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["fit_step_time", "trimmed_mean"]

# Below this part of the proportional slope a fit is not believed: it would hand a rank samples without end.
_LEAST_PART_OF_PROPORTIONAL = 0.05
_PRIOR_RELATIVE_DEVIATION = 0.5
# A step is timed to no better than this part of it, however well a few measurements happen to agree.
_LEAST_RELATIVE_DEVIATION = 0.002


@dataclass(frozen=True)
class _SizeGroup:
    """The steps of one size: their number, robust mean and the variance of that mean (seconds squared)."""

    samples: int
    count: int
    mean_s: float
    variance_of_mean: float


def trimmed_mean(values: Sequence[float], trim: float = 0.2) -> float:
    """Return the mean without the lowest and the highest ``trim`` part of ``values``.

    Args:
        values: at least one number.
        trim: part cut off at each end, in [0, 0.5).

    Returns:
        The mean of what is left; at least one value always is.

    Raises:
        ConfigurationError: there is no value, or ``trim`` is out of range.
    """
    if not values:
        raise ConfigurationError("`values` must have at least one number, got none.")
    if not 0 <= trim < 0.5:
        raise ConfigurationError(f"`trim` must be in [0, 0.5), got {trim}.")
    return _mean(_trimmed(values, trim))


def fit_step_time(timings: Sequence[StepTiming]) -> StepTime:
    """Fit the step time of a rank to its measured steps; robust against single outliers.

    Args:
        timings: measured steps of at least one size. Steps without samples or without a finite positive time
            are left out.

    Returns:
        The fitted step time, with ``overhead_s >= 0`` and ``seconds_per_sample > 0``.

    Raises:
        ConfigurationError: no usable step is left.

    Example:
        >>> fit = fit_step_time([StepTiming(n, 0.020 + 0.001 * n) for n in (10, 10, 30, 30)])
        >>> round(fit.overhead_s, 3), round(fit.seconds_per_sample, 4)
        (0.02, 0.001)
    """
    usable = [t for t in timings if t.samples > 0 and math.isfinite(t.own_s) and t.own_s > 0]
    if not usable:
        raise ConfigurationError(f"`timings` must have a step with samples and a positive time, got {list(timings)}.")
    groups = _group_by_size(usable)
    weights = [1.0 / group.variance_of_mean for group in groups]
    total = sum(weights)
    mean_n = sum(w * g.samples for w, g in zip(weights, groups, strict=True)) / total
    mean_s = sum(w * g.mean_s for w, g in zip(weights, groups, strict=True)) / total
    proportional = mean_s / mean_n
    slope = proportional
    spread = sum(w * (g.samples - mean_n) ** 2 for w, g in zip(weights, groups, strict=True))
    if spread > 0:
        covariance = sum(w * (g.samples - mean_n) * (g.mean_s - mean_s) for w, g in zip(weights, groups, strict=True))
        prior_precision = (_PRIOR_RELATIVE_DEVIATION * proportional) ** -2
        # `spread` is the precision of the least-squares slope `covariance / spread`
        slope = (covariance + prior_precision * proportional) / (spread + prior_precision)
    slope = min(max(slope, _LEAST_PART_OF_PROPORTIONAL * proportional), proportional)
    return StepTime(overhead_s=max(mean_s - slope * mean_n, 0.0), seconds_per_sample=slope)


def _group_by_size(timings: Sequence[StepTiming]) -> list[_SizeGroup]:
    by_size: defaultdict[int, list[float]] = defaultdict(list)
    for timing in timings:
        by_size[timing.samples].append(timing.own_s)
    kept = {samples: _trimmed(values, 0.2) for samples, values in sorted(by_size.items())}
    # one relative deviation for all sizes: with a handful of steps a size, each size's own would be a lottery
    deviations = [v / _mean(values) - 1.0 for values in kept.values() for v in values]
    freedom = max(len(deviations) - len(kept), 1)
    relative = max(math.sqrt(sum(d * d for d in deviations) / freedom), _LEAST_RELATIVE_DEVIATION)
    return [
        _SizeGroup(samples, len(values), _mean(values), (relative * _mean(values)) ** 2 / len(values))
        for samples, values in kept.items()
    ]


def _trimmed(values: Sequence[float], trim: float) -> list[float]:
    cut = int(len(values) * trim)
    return sorted(values)[cut : len(values) - cut]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
