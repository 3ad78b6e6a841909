"""Decide, window after window, which plan to follow, and how long to measure next.

The step times of all ranks are learned (``step_time_model``) and the global batch is divided accordingly
(``batch_solver``).  These rules decide whether the new plan is worth a change:

- The plan with which the run began is left only for one that is ``min_gain`` faster beyond doubt: the slowest rank must
  be slow even if it was measured too slow by chance.  What is possible by chance depends on the number of ranks, since
  the worst of a thousand measurements is far off.
- While tuning, a run that has left its first plan follows the best plan known: the next change corrects a wrong one.
- Afterwards, a small gain must again be beyond doubt, and some time must have passed since the last change.  A large
  gain is taken at once, and for some steps after it the best plan known is followed again.
- A run returns to its first plan if that plan is as good as any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from lightning_hetero.balance.batch.batch_solver import keeps_limits, predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.checked import as_ints, as_mapping, entry
from lightning_hetero.balance.tuning.shrinkage import shrink
from lightning_hetero.balance.tuning.step_time_model import StepTimeModel
from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTime, WindowTiming

__all__ = [
    "COOL_DOWN_WINDOWS",
    "LARGE_GAIN",
    "SETTLE_STEPS",
    "Decision",
    "Rebalancer",
    "Window",
    "doubt_of",
    "steps_between_windows",
]

# The probability that one check of all ranks finds a difference although there is none.
_FALSE_ALARMS = 0.001
# A gain below this fraction of `min_gain` counts as none.
_NO_GAIN = 0.2
# While tuning, a gain is taken if it remains one with all ranks measured this many standard deviations too slow.
_LITTLE_DOUBT = 0.5
# A gain above this does not wait for the cool-down.
LARGE_GAIN = 0.15
COOL_DOWN_WINDOWS = 2
# After a large change of speed, the best plan known is followed for this many steps, as in the tuning.
_FOLLOW_STEPS = 16
# After a change of mini-batch size, the allocator and the autotuner of a device see new shapes.
SETTLE_STEPS = 1
_FIRST_WINDOW = 2
_LONGEST_WINDOW = 10
# Checks for drift are at least this far apart, so that they cost next to nothing if steps are short or ranks are many:
# a decision takes about 5 microseconds per rank.
_CHECK_INTERVAL_S = 0.25
_CHECK_INTERVAL_S_PER_RANK = 0.0005
_LONGEST_PAUSE = 20
# However long an exchange takes, those of the watching take no more than this part of the time.
_EXCHANGES = 0.01


@dataclass(frozen=True)
class Window:
    """The steps that are measured next.

    Attributes:
        skipped_steps: Number of steps before the first measured one.
        measured_steps: Number of measured steps.
        synchronised: Whether the hosts wait for their devices before each measured step.
    """

    skipped_steps: int
    measured_steps: int
    synchronised: bool = False


@dataclass(frozen=True)
class Decision:
    """The decision on what all ranks do next.

    Attributes:
        plan: The plan to follow from now on; the current one if nothing changes.
        step_times: Expected step time of each rank, shape ``(world_size,)``; empty until every rank has been measured.
        communication_s: Time of a step besides the slowest rank's own time.
        gain: Gain of ``plan`` over the plan before it; 0.25 is a quarter more samples/s.
        tuned: Whether the tuning is over.
        window: The steps to measure next.
        tune_steps_left: Maximum number of further steps until the tuning is over.
        unmeasured_ranks: Ranks of which no step has been measured so far.
    """

    plan: BatchPlan
    step_times: tuple[StepTime, ...]
    communication_s: float
    gain: float
    tuned: bool
    window: Window
    tune_steps_left: int
    unmeasured_ranks: tuple[int, ...]


def doubt_of(world_size: int, freedom: float) -> float:
    """Return the number of standard deviations that the worst rank can be off by chance.

    Student's quantile by the first term of its expansion around the normal one (M. Abramowitz and I. Stegun,
    *Handbook of Mathematical Functions*, 26.7.5).

    Args:
        world_size: Number of ranks.
        freedom: Number of steps that the estimate of the standard deviation is based on.
    """
    z = NormalDist().inv_cdf(1 - _FALSE_ALARMS / world_size)
    return z + (z**3 + z) / (4 * freedom)


def steps_between_windows(step_s: float, watch_steps: int, world_size: int, exchange_s: float) -> int:
    """Return for how many steps nothing is measured while watching, so that exchanges cost next to nothing.

    Args:
        step_s: Seconds per step.
        watch_steps: Number of steps of a window.
        world_size: Number of ranks.
        exchange_s: Seconds that an exchange of measurements takes without waiting.
    """
    interval_s = max(_CHECK_INTERVAL_S, _CHECK_INTERVAL_S_PER_RANK * world_size)
    apart = math.ceil(interval_s / max(step_s, 1e-9))
    affordable = math.ceil(exchange_s / _EXCHANGES / max(step_s, 1e-9))
    return max(min(apart, (_LONGEST_PAUSE + 1) * watch_steps), affordable, watch_steps) - watch_steps


class Rebalancer:
    """Decides on the plans of one run; lives on rank 0.

    Args:
        initial: The plan with which the run began.
        current: The plan that holds now.
        limits: Limits that every plan must respect.
        min_gain: Minimum predicted gain over ``initial`` that justifies another plan.
        tune_steps: Number of steps in which windows are short and the best plan known is followed.
        watch_steps: Number of steps of a window afterwards.
        model: Step times known from an earlier run; None if there are none. A run with a model does not tune.

    Attributes:
        exchange_s: Seconds that an exchange of measurements takes without waiting.
    """

    def __init__(
        self,
        initial: BatchPlan,
        current: BatchPlan,
        limits: BatchLimits,
        min_gain: float,
        tune_steps: int,
        watch_steps: int = _LONGEST_WINDOW,
        model: StepTimeModel | None = None,
    ) -> None:
        self.initial = initial
        self.current = current
        self.exchange_s = 0.0
        self._limits = limits
        self._min_gain = min_gain
        self._watch_steps = watch_steps
        self._tune_steps_left = tune_steps if model is None else 0
        self._windows_since_change = COOL_DOWN_WINDOWS
        self._communication_s = 0.0
        self._observed = 0
        self._deviations: tuple[float, ...] = ()
        self.model = model or StepTimeModel(initial.world_size)

    def set_limits(self, limits: BatchLimits) -> None:
        """Respect ``limits`` from the next decision on; a plan that breaks them is left at once."""
        self._limits = limits

    @property
    def must_change(self) -> bool:
        """Whether the current plan breaks the limits, so that it is left at once."""
        return not keeps_limits(self.current, self._limits)

    def follow(self, other: Rebalancer) -> None:
        """Take over the plan, the limits and the costs of an exchange from another rebalancer."""
        self.current, self._limits, self.exchange_s = other.current, other._limits, other.exchange_s

    def first_window(self) -> Window:
        """Return the first window to measure."""
        return Window(0, self._length_of_window())

    def update(self, windows: Sequence[WindowTiming | None]) -> Decision:
        """Learn from the latest window of each rank, shape ``(world_size,)``, and decide."""
        self.model.observe(windows)
        self._learn_communication(windows)
        self._tune_steps_left -= self._length_of_window()
        self._windows_since_change += 1
        if not self.model.ready:
            return self._without_times()
        equal_size = self.initial.global_batch_size / self.initial.world_size
        step_times, self._deviations = shrink(self.model, equal_size, self._doubt)
        target = self._best(step_times)
        gain = self._gain(step_times, target)
        must = not keeps_limits(self.current, self._limits)
        if target != self.current and (must or self._worth_it(step_times, target, gain)):
            if self._tune_steps_left <= 0 and gain > LARGE_GAIN:
                self._tune_steps_left = _FOLLOW_STEPS
            return self._change(target, step_times, gain)
        if self._settled(gain):
            self._tune_steps_left = 0
        return self._decision(self.current, step_times, 0.0)

    def _change(self, target: BatchPlan, step_times: tuple[StepTime, ...], gain: float) -> Decision:
        self.current = target
        self._windows_since_change = 0
        self._tune_steps_left -= SETTLE_STEPS
        return self._decision(target, step_times, gain)

    def _without_times(self) -> Decision:
        """Decide before every rank has been measured: keep the current shares as far as the limits allow."""
        if keeps_limits(self.current, self._limits):
            return self._decision(self.current, (), 0.0)
        batch, limits = self.current.global_batch_size, self._limits
        target = proportional_plan(self.current.shares, batch, limits, limits.min_samples)
        return self._change(target, (), 0.0)

    # ---- decision --------------------------------------------------------------------------------------------------

    def _best(self, step_times: Sequence[StepTime]) -> BatchPlan:
        best = solve_batch(step_times, self.initial.global_batch_size, self._limits, self._limits.min_samples)
        if not keeps_limits(self.initial, self._limits):
            return best
        saved_s = predicted_step_s(step_times, self.initial) - predicted_step_s(step_times, best)
        return self.initial if saved_s <= _NO_GAIN * self._min_gain * self._step_s(step_times, best) else best

    def _worth_it(self, step_times: Sequence[StepTime], target: BatchPlan, gain: float) -> bool:
        if gain <= _NO_GAIN * self._min_gain:
            return False
        sure = self._gain(step_times, target, self._doubt)
        if self.current == self.initial:
            return gain > self._min_gain and sure > self._min_gain / 2
        if self._tune_steps_left > 0:
            return self._gain(step_times, target, _LITTLE_DOUBT) > 0
        if gain > LARGE_GAIN and sure > 0:
            return True
        return sure > 0 and self._windows_since_change > COOL_DOWN_WINDOWS

    def _gain(self, step_times: Sequence[StepTime], target: BatchPlan, doubt: float = 0.0) -> float:
        """Predict the relative gain of ``target`` over the current plan, in samples per second.

        Args:
            step_times: Expected step time of each rank.
            target: The plan to compare with the current one.
            doubt: Number of standard deviations by which ranks are assumed to be measured too slow.
        """
        old_s = max(
            time.seconds(n) * (1 - doubt * deviation)
            for time, n, deviation in zip(step_times, self.current.samples, self._deviations, strict=True)
        )
        new_s = predicted_step_s(step_times, target)
        return (old_s + self._communication_s) / (new_s + self._communication_s) - 1.0

    @property
    def _doubt(self) -> float:
        return doubt_of(self.initial.world_size, self.model.freedom)

    def _settled(self, gain: float) -> bool:
        """Return whether more measuring would hardly change the plan."""
        return gain + self._doubt * max(self._deviations) < self._min_gain

    # ---- times -----------------------------------------------------------------------------------------------------

    def _learn_communication(self, windows: Sequence[WindowTiming | None]) -> None:
        # all ranks wait for the slowest; the waiting of that one is the communication itself, which no plan removes
        waiting = [window.waiting_s for window in windows if window is not None]
        if not waiting:
            return
        self._observed += 1
        self._communication_s += (min(waiting) - self._communication_s) / min(self._observed, 10)

    def _step_s(self, step_times: Sequence[StepTime], plan: BatchPlan) -> float:
        return predicted_step_s(step_times, plan) + self._communication_s

    def _length_of_window(self) -> int:
        if self._tune_steps_left <= 0:
            return self._watch_steps
        return min(_FIRST_WINDOW + self._observed // 2, 5, self._tune_steps_left)

    def _decision(self, plan: BatchPlan, step_times: tuple[StepTime, ...], gain: float) -> Decision:
        tuned = self._tune_steps_left <= 0
        skipped = SETTLE_STEPS if self._windows_since_change == 0 else 0
        if tuned and step_times and not skipped:
            step_s = self._step_s(step_times, plan)
            skipped = steps_between_windows(step_s, self._watch_steps, plan.world_size, self.exchange_s)
        window = Window(skipped, self._length_of_window())
        return Decision(
            plan=plan,
            step_times=step_times,
            communication_s=self._communication_s,
            gain=gain,
            tuned=tuned,
            window=window,
            tune_steps_left=max(self._tune_steps_left, 0),
            unmeasured_ranks=tuple(self.model.unmeasured),
        )

    # ---- checkpoint ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain numbers."""
        return {"initial": list(self.initial.samples), "model": self.model.to_dict()}

    @staticmethod
    def model_of(state: Any) -> StepTimeModel:
        """Return the model in a state of :meth:`to_dict`.

        Raises:
            ConfigurationError: The state is not of this form.
        """
        return StepTimeModel.from_dict(entry(as_mapping(state, "balance"), "model"))

    @staticmethod
    def initial_of(state: Any) -> BatchPlan:
        """Return the first plan of the run in a state of :meth:`to_dict`.

        Raises:
            ConfigurationError: The state is not of this form.
        """
        return BatchPlan(as_ints(entry(as_mapping(state, "balance"), "initial"), "initial"))
