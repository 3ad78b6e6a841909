r"""Learn online how long each rank takes for a mini-batch of n samples, and how certain that is.

Every rank :math:`r` has a state :math:`x_r = (a_r, c_r)`, overhead and cost per sample, and a window of steps of size
:math:`n` measures :math:`a_r + c_r n` with noise.  A Kalman filter (R. Kalman, *A New Approach to Linear Filtering and
Prediction Problems*, J. Basic Eng. 82, 1960) keeps the mean and covariance of each state:

- The first window fixes the level at its size.  The prior is a time proportional to the size, with a standard deviation
  of 1/2 on the slope, so the data decide as soon as a second size is measured.
- Between windows the speed of a rank wanders.  Its state is multiplied by a random factor near 1, which keeps the ratio
  of overhead to cost, and with it what was learned from other sizes.
- A window that the filter cannot explain is a change of speed (throttling, another tenant, recovery).  The level is
  learned again from that window, and the ratio is kept.  If the size has changed too, the next windows tell a change of
  speed from a wrong ratio.
- A window that is off by an order of magnitude rescales the rank: a clock that jumped must not spoil the units of all
  later measurements.
- The noise of a rank is estimated from the spread inside its windows and, because disturbances last longer than a step,
  from the distance between windows and their predictions.

Times and sizes are divided by those of the rank's first window, so the same constants fit all devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_hetero.balance.checked import as_array, as_list, as_mapping, entry
from lightning_hetero.balance.types import StepTime, WindowTiming
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["StepTimeModel"]

_Floats = npt.NDArray[np.float64]

_SLOPE_DEVIATION = 0.5
# Relative standard deviation by which the speed of a steady device wanders per step.
_WANDER = 0.0007
# Relative deviation below which no window is trusted, however well its steps agree.
_MIN_DEVIATION = 0.002
# Relative deviation of a step that is assumed before anything is measured, and its weight in steps.
_NOISE_GUESS = 0.05
_NOISE_GUESS_STEPS = 4.0
_NOISE_MEMORY = 0.98
# The spread of a window counts at most this many times the spread so far: a change of speed inside a window is not
# noise, and a rank that was taken for noisy would be ignored for long.
_MAX_SPREAD = 3.0
# A window that is off its prediction by this many standard deviations and by this fraction is a change of speed.
_CHANGE_DEVIATIONS = 5.0
_CHANGE_PART = 0.1
# A window within this factor of what some slope predicts may be explained by that slope.
_EXPLAINED = 1.05
# A window this many times outside what any overhead explains was measured wrongly, or the earlier ones were.
_ABSURD = 8.0
_SURPRISE_MEMORY = 0.95
_FIRST_SURPRISE = 2.0
_MAX_SURPRISE = 9.0
# A slope below this fraction of the proportional one is not trusted: it would give a rank ever more samples.
_MIN_SLOPE = 0.05
# For the check of a saved state: no step is shorter, and rounding errors are no larger.
_MIN_SCALE_S = 1e-12
_ROUNDING = 1e-6


class StepTimeModel:
    """A model of the step times of all ranks, learned from windows of measured steps.

    Args:
        world_size: Number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        self._scale_n: _Floats = np.zeros(world_size)
        self._scale_s: _Floats = np.ones(world_size)
        self._size: _Floats = np.ones(world_size)
        self._mean: _Floats = np.zeros((world_size, 2))
        self._covariance: _Floats = np.zeros((world_size, 2, 2))
        self._squares: _Floats = np.zeros(world_size)
        self._freedom: _Floats = np.zeros(world_size)
        self._surprise: _Floats = np.full(world_size, _FIRST_SURPRISE)

    @property
    def unmeasured(self) -> tuple[int, ...]:
        """The ranks that have not been measured yet."""
        return tuple(int(rank) for rank in np.flatnonzero(self._scale_n == 0))

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self._scale_n)

    @property
    def ready(self) -> bool:
        """Whether every rank has been measured."""
        return not self.unmeasured

    def observe(self, windows: Sequence[WindowTiming | None]) -> None:
        """Learn from one window per rank, shape ``(world_size,)``; None for a rank that measured nothing."""
        for rank, window in enumerate(windows):
            if window is not None and self._scale_n[rank] == 0:
                self._begin(rank, window)
        known = [w if w is not None and self._scale_n[r] > 0 else None for r, w in enumerate(windows)]
        ranks = np.array([r for r, w in enumerate(known) if w is not None], dtype=np.int64)
        if len(ranks):
            self._update(ranks, [w for w in known if w is not None])

    def _begin(self, rank: int, window: WindowTiming) -> None:
        self._scale_n[rank], self._scale_s[rank] = window.samples, window.own_s
        self._mean[rank] = (0.0, 1.0)
        # both the level and its overhead are unknown
        level, slope = np.array([0.0, 1.0]), np.array([-1.0, 1.0])
        self._covariance[rank] = np.outer(level, level) + _SLOPE_DEVIATION**2 * np.outer(slope, slope)

    def _update(self, ranks: npt.NDArray[np.int64], windows: Sequence[WindowTiming]) -> None:
        low, high = self._rescale(ranks, windows)
        scale_s = self._scale_s[ranks]
        steps = np.array([w.steps for w in windows], dtype=np.float64)
        size_before = self._size[ranks]
        self._size[ranks] = np.array([w.samples for w in windows]) / self._scale_n[ranks]
        measured = np.array([w.own_s for w in windows]) / scale_s
        deviation = np.array([w.deviation_s for w in windows]) / scale_s
        h = np.stack([np.ones(len(ranks)), self._size[ranks]], axis=1)
        x, p = self._mean[ranks], self._covariance[ranks]
        predicted = np.sum(h * x, axis=1)
        level = np.maximum(predicted, _MIN_SLOPE)

        spread = np.minimum(deviation / measured, _MAX_SPREAD * self._noise()[ranks])
        self._squares[ranks] = _NOISE_MEMORY * self._squares[ranks] + (steps - 1) * spread**2
        self._freedom[ranks] = _NOISE_MEMORY * self._freedom[ranks] + (steps - 1)
        part = self._noise()[ranks] ** 2 / steps * self._surprise[ranks] + _MIN_DEVIATION**2
        noise = part * level**2

        p = p + (_WANDER**2 * steps)[:, None, None] * _outer(x, x)
        error = measured - predicted
        variance = _quadratic(p, h) + noise
        surprise = error**2 / variance
        changed = (surprise > _CHANGE_DEVIATIONS**2) & (np.abs(error) > _CHANGE_PART * level)
        p = p + np.where(changed, (error / level) ** 2, 0.0)[:, None, None] * _outer(x, x)
        # if the size has changed too and some slope explains the window, the old slope may have been wrong
        step = self._size[ranks] - size_before
        turned = changed & (step != 0) & (measured > low / _EXPLAINED) & (measured < high * _EXPLAINED)
        turn = np.where(turned, error / np.where(turned, step, 1.0), 0.0)[:, None]
        around = np.stack([-size_before, np.ones(len(ranks))], axis=1) * turn
        p = p + _outer(around, around)
        variance = _quadratic(p, h) + noise
        surprise = np.where(changed, 1.0, np.minimum(surprise, _MAX_SURPRISE))
        self._surprise[ranks] = np.maximum(
            _SURPRISE_MEMORY * self._surprise[ranks] + (1 - _SURPRISE_MEMORY) * surprise, 1.0
        )
        ph = np.einsum("rij,rj->ri", p, h)
        self._mean[ranks] = x + ph * (error / variance)[:, None]
        self._covariance[ranks] = p - _outer(ph, ph) / variance[:, None, None]

    def _rescale(self, ranks: npt.NDArray[np.int64], windows: Sequence[WindowTiming]) -> tuple[_Floats, _Floats]:
        """Rescale the unit of time of each rank whose window is off by an order of magnitude.

        Returns:
            The shortest and the longest time that the windows could measure without a change of speed, whatever
            fraction of a step is overhead, in the units of the ranks.
        """
        measured = np.array([w.own_s for w in windows]) / self._scale_s[ranks]
        ratio = np.array([w.samples for w in windows]) / (self._size[ranks] * self._scale_n[ranks])
        level = self._level()[ranks]
        # from nothing but overhead to no overhead at all
        low, high = level * np.minimum(ratio, 1.0), level * np.maximum(ratio, 1.0)
        factor = np.where(measured > _ABSURD * high, measured / high, 1.0)
        factor = np.where(measured < low / _ABSURD, measured / low, factor)
        self._scale_s[ranks] *= factor
        x = self._mean[ranks]
        self._covariance[ranks] += np.where(factor != 1.0, 1.0, 0.0)[:, None, None] * _outer(x, x)
        return low, high

    def _noise(self) -> _Floats:
        """Return the relative standard deviation of a step of each rank."""
        guess = _NOISE_GUESS_STEPS
        common = (guess * _NOISE_GUESS**2 + self._squares.sum()) / (guess + self._freedom.sum())
        own: _Floats = np.sqrt((guess * common + self._squares) / (guess + self._freedom))
        return own

    def step_times(self) -> tuple[StepTime, ...]:
        """Return the expected step time of each rank, a line through its level at its current size."""
        level = self._level()
        proportional = level / self._size
        slope = np.clip(self._mean[:, 1], _MIN_SLOPE * proportional, proportional)
        overhead = np.maximum(level - slope * self._size, 0.0) * self._scale_s
        cost = slope * self._scale_s / self._scale_n
        return tuple(StepTime(float(a), float(c)) for a, c in zip(overhead, cost, strict=True))

    def deviations(self, samples: Sequence[float] | None = None) -> tuple[float, ...]:
        """Return how certain the expected time of each rank is.

        Args:
            samples: Mini-batch size of each rank for which to answer; by default that of its latest window.

        Returns:
            Relative standard deviations of the expected times, shape ``(world_size,)``.
        """
        size = self._size if samples is None else np.asarray(samples, dtype=np.float64) / self._scale_n
        h = np.stack([np.ones(len(size)), size], axis=1)
        level = np.maximum(np.sum(h * self._mean, axis=1), 1e-3)
        deviations = np.sqrt(np.maximum(_quadratic(self._covariance, h), 0.0)) / level
        return tuple(float(d) for d in deviations)

    @property
    def samples(self) -> tuple[float, ...]:
        """The mini-batch size of each rank in its latest window."""
        return tuple(float(n) for n in self._size * self._scale_n)

    @property
    def freedom(self) -> float:
        """The number of steps that the noise estimate is based on (the degrees of freedom of its variance)."""
        return _NOISE_GUESS_STEPS + float(self._freedom.sum())

    def _level(self) -> _Floats:
        level: _Floats = np.maximum(self._mean[:, 0] + self._mean[:, 1] * self._size, 1e-3)
        return level

    def to_dict(self) -> dict[str, Any]:
        """Return lists of plain numbers, for JSON and for checkpoints."""
        return {name: value.tolist() for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, state: Any) -> StepTimeModel:
        """Return the model that :meth:`to_dict` has described.

        Raises:
            ConfigurationError: ``state`` has another form, or no model can reach it.
        """
        values = as_mapping(state, "model")
        model = cls(len(as_list(entry(values, "_scale_n"), "_scale_n")))
        for name, blank in vars(model).items():
            setattr(model, name, as_array(entry(values, name), name, blank.shape))
        model._check()
        return model

    def _check(self) -> None:
        """Check that everything computed from the state stays finite."""
        p = self._covariance
        roots = np.sqrt(np.abs(p[:, 0, 0] * p[:, 1, 1])) * (1 + _ROUNDING) + _ROUNDING
        rules = {
            "_scale_n": (self._scale_n == 0) | (self._scale_n >= 1),
            "_scale_s": self._scale_s >= _MIN_SCALE_S,
            "_size": self._size * np.maximum(self._scale_n, 1) >= _ROUNDING,
            "_squares": self._squares >= 0,
            "_freedom": self._freedom >= 0,
            "_surprise": self._surprise >= 1,
            "_covariance": (np.diagonal(p, axis1=1, axis2=2) >= -_ROUNDING).all(axis=1)
            & (np.abs(p[:, 0, 1]) <= roots)
            & (np.abs(p[:, 1, 0]) <= roots),
        }
        for name, kept in rules.items():
            if not np.all(kept):
                raise ConfigurationError(
                    f"`{name}` of rank {int(np.argmin(kept))} must be a value that a model can reach, got another one."
                )


def _outer(a: _Floats, b: _Floats) -> _Floats:
    return a[:, :, None] * b[:, None, :]


def _quadratic(p: _Floats, h: _Floats) -> _Floats:
    value: _Floats = np.einsum("ri,rij,rj->r", h, p, h)
    return value
