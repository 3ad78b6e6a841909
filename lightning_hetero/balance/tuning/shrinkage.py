r"""Shrink the estimates of ranks that do not differ significantly towards their mean.

After two steps under 10 % jitter, each of a thousand ranks is known to 7 %, and the one that seems slowest seems 20 %
slower than it is.  A plan that trusted these estimates would wait for the ranks that seem fastest.  Most ranks of a
cluster are alike, though.  With group mean :math:`m`, variance :math:`\tau^2` between the ranks of the group and
measurement variance :math:`\sigma_r^2`, the best estimate for rank :math:`r` is

.. math:: m + \frac{\tau^2}{\tau^2 + \sigma_r^2} (x_r - m)

(empirical Bayes; B. Efron and C. Morris, *Stein's Estimation Rule and its Competitors*, J. Am. Stat. Assoc. 68, 1973).
No estimate is moved by more than two standard deviations, so a rank that differs keeps most of its difference (B. Efron
and C. Morris, *Limiting the Risk of Bayes and Empirical Bayes Estimators*, J. Am. Stat. Assoc. 67, 1972).  As
measurements accumulate, :math:`\sigma_r` shrinks and the estimate of each rank rests on its own measurements.  A group
ends where the next rank is significantly slower, so kinds of devices and single stragglers form groups of their own,
whatever their names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_hetero.balance.tuning.step_time_model import StepTimeModel
from lightning_hetero.balance.types import StepTime

__all__ = ["shrink"]

# Mini-batches of similar ranks are within this factor of each other.
_ALIKE = 1.25
# In standard deviations: how far a member may count as being from its group, and how far a rank is moved at most.
_FARTHEST_MEMBER = 4.0
_FARTHEST_SHIFT = 2.0


def shrink(model: StepTimeModel, samples: float, doubt: float) -> tuple[tuple[StepTime, ...], tuple[float, ...]]:
    """Return the step times of a model, with those of similar ranks shrunk towards their mean.

    Args:
        model: Step times as measured.
        samples: Mini-batch size at which ranks are compared to find similar ones.
        doubt: Number of standard deviations; ranks that are further apart are not similar.

    Returns:
        The step times and their relative standard deviations at the current mini-batch size of each rank, both of shape
        ``(world_size,)``.
    """
    times = model.step_times()
    group = _groups(np.log([t.seconds(samples) for t in times]), model.deviations([samples] * len(times)), doubt)
    # similar ranks have nearly the same mini-batch, and at that size, just measured, they are known best
    now = np.asarray(model.samples)
    size = (np.bincount(group, now) / np.bincount(group))[group]
    far = np.maximum(now, size) > _ALIKE * np.minimum(now, size)
    group[far] = group.max() + 1 + np.arange(int(far.sum()))  # not comparable: each forms its own group
    count = np.bincount(group)
    size = (np.bincount(group, now) / np.maximum(count, 1))[group]
    x = np.log([t.seconds(n) for t, n in zip(times, size.tolist(), strict=True)])
    variance = np.square(model.deviations(size.tolist()))
    mean = (np.bincount(group, x) / np.maximum(count, 1))[group]
    sigma = np.sqrt(variance)
    # a straggler must neither widen the spread of its group nor be made to look like the others
    offset = np.clip(x - mean, -_FARTHEST_MEMBER * sigma, _FARTHEST_MEMBER * sigma)
    between = np.bincount(group, offset**2) / np.maximum(count - 1, 1)
    true = np.maximum(between - np.bincount(group, variance) / np.maximum(count, 1), 0.0)[group]
    # the weight of the rank itself, and the standard deviation left by the rank and by the mean of its group
    own = np.where(count[group] > 1, true / np.maximum(true + variance, 1e-300), 1.0)
    # at its own size a rank is known better than at that of the group, for which it must be extrapolated
    here = np.minimum(sigma, model.deviations())
    left = here * np.sqrt(own + (1.0 - own) / count[group])
    shift = np.clip((own - 1.0) * (x - mean), -_FARTHEST_SHIFT * here, _FARTHEST_SHIFT * here)
    factors = np.exp(shift).tolist()
    pooled = tuple(StepTime(t.overhead_s * f, t.seconds_per_sample * f) for t, f in zip(times, factors, strict=True))
    return pooled, tuple(left.tolist())


def _groups(x: npt.NDArray[np.float64], deviations: Sequence[float], doubt: float) -> npt.NDArray[np.int64]:
    """Number the groups, which are runs of sorted values without a gap of more than ``doubt`` deviations."""
    order = np.argsort(x, kind="stable")
    sigma = np.asarray(deviations)[order]
    apart = np.diff(x[order]) > doubt * np.maximum(sigma[1:], sigma[:-1])
    group = np.empty(len(x), dtype=np.int64)
    group[order] = np.concatenate([[0], np.cumsum(apart)])
    return group
