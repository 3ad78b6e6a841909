"""Decide, window after window, which plan to follow, and how long to measure next.

The step times of all ranks are learned (``step_time_model``) and the global batch is divided anew (``batch_solver``).
Whether that is worth a change is judged as follows.

- The plan that the run began with is left only for one that is ``min_gain`` faster, beyond doubt: the slowest rank must
  be slow even if it was measured too slow by chance.  "By chance" depends on the number of ranks, since of a thousand
  measurements the worst is far off.
- While tuning, a run that has left it follows the best plan known: a wrong step is mended by the next.
- Afterwards a small gain must again be beyond doubt, and some time must have passed since the last change; a large one
  is taken at once, and for some steps after it the best plan known is followed again.
- A run in which the first plan is as good as any goes back to it.
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

__all__ = ["Decision", "Rebalancer", "Window"]

# Of all looks at all ranks together, so many may find a difference where there is none.
_FALSE_ALARMS = 0.001
# A gain below this part of `min_gain` is none.
_NO_GAIN = 0.2
# While tuning, a gain is taken that would be one if the ranks were measured so many standard deviations too slow.
_LITTLE_DOUBT = 0.5
# A gain that does not wait for the cool-down.
_LARGE_GAIN = 0.15
_COOL_DOWN_WINDOWS = 2
# After a large change of speed the best plan known is followed for so many steps, as in the tuning.
_FOLLOW_STEPS = 16
# After a change of size the allocator and the autotuner of the device see new shapes.
_SETTLE_STEPS = 1
_FIRST_WINDOW = 2
_LONGEST_WINDOW = 10
# Looks for drift are at least this far apart, so that they cost next to nothing where steps are short or ranks many: a
# judgement takes about 5 microseconds a rank.
_LOOK_S = 0.25
_LOOK_S_A_RANK = 0.0005
_LONGEST_PAUSE = 20


@dataclass(frozen=True)
class Window:
    """Which steps are measured next.

    Attributes:
        skipped_steps: steps that pass before the measuring begins.
        measured_steps: steps that are measured then.
    """

    skipped_steps: int
    measured_steps: int


@dataclass(frozen=True)
class Decision:
    """What all ranks do next.

    Attributes:
        plan: the plan to follow from now on; the present one where nothing is to be changed.
        step_times: expected step time of each rank, shape ``(world_size,)``; empty before every rank was measured.
        communication_s: what a step takes besides the slowest rank's own time.
        gain: how much faster ``plan`` is than the plan before it; 0.25 is a quarter more samples/s.
        tuned: whether the first search for the shares is over.
        window: the steps to measure next.
        tune_steps_left: most further steps until the first search for the shares is over.
        unmeasured_ranks: ranks of which no step was measured so far.
    """

    plan: BatchPlan
    step_times: tuple[StepTime, ...]
    communication_s: float
    gain: float
    tuned: bool
    window: Window
    tune_steps_left: int
    unmeasured_ranks: tuple[int, ...]


class Rebalancer:
    """The judgement of one run; lives on rank zero.

    Args:
        initial: the plan that the run began with.
        current: the plan that holds now.
        limits: what every plan has to respect.
        min_gain: least predicted gain over ``initial`` that justifies another plan.
        tune_steps: steps in which windows are short and the best plan known is followed.
        watch_steps: steps of a window afterwards.
        model: what is known of the step times; None for nothing. A run with a model does not tune.
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
        self._limits = limits
        self._min_gain = min_gain
        self._watch_steps = watch_steps
        self._tune_steps_left = tune_steps if model is None else 0
        self._windows_since_change = _COOL_DOWN_WINDOWS
        self._communication_s = 0.0
        self._observed = 0
        self._deviations: tuple[float, ...] = ()
        self.model = model or StepTimeModel(initial.world_size)
        self._normal_doubt = NormalDist().inv_cdf(1 - _FALSE_ALARMS / initial.world_size)

    def set_limits(self, limits: BatchLimits) -> None:
        """Respect ``limits`` from the next judgement on; a plan that does not is left at once."""
        self._limits = limits

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
        has_to = not keeps_limits(self.current, self._limits)
        if target != self.current and (has_to or self._worth_it(step_times, target, gain)):
            if self._tune_steps_left <= 0 and gain > _LARGE_GAIN:
                self._tune_steps_left = _FOLLOW_STEPS
            return self._change(target, step_times, gain)
        if self._settled(gain):
            self._tune_steps_left = 0
        return self._decision(self.current, step_times, 0.0)

    def _change(self, target: BatchPlan, step_times: tuple[StepTime, ...], gain: float) -> Decision:
        self.current = target
        self._windows_since_change = 0
        self._tune_steps_left -= _SETTLE_STEPS
        return self._decision(target, step_times, gain)

    def _without_times(self) -> Decision:
        """Judge before every rank was measured: the present shares, as far as limits allow."""
        if keeps_limits(self.current, self._limits):
            return self._decision(self.current, (), 0.0)
        batch = self.current.global_batch_size
        return self._change(proportional_plan(self.current.shares, batch, self._limits, min_samples=1), (), 0.0)

    # ---- judgement -------------------------------------------------------------------------------------------------

    def _best(self, step_times: Sequence[StepTime]) -> BatchPlan:
        best = solve_batch(step_times, self.initial.global_batch_size, self._limits, min_samples=1)
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
        if gain > _LARGE_GAIN and sure > 0:
            return True
        return sure > 0 and self._windows_since_change > _COOL_DOWN_WINDOWS

    def _gain(self, step_times: Sequence[StepTime], target: BatchPlan, doubt: float = 0.0) -> float:
        """Predict how many more samples a second ``target`` processes, were the ranks measured ``doubt`` too slow."""
        old_s = max(
            time.seconds(n) * (1 - doubt * deviation)
            for time, n, deviation in zip(step_times, self.current.samples, self._deviations, strict=True)
        )
        new_s = predicted_step_s(step_times, target)
        return (old_s + self._communication_s) / (new_s + self._communication_s) - 1.0

    @property
    def _doubt(self) -> float:
        """How many standard deviations a rank can be off by chance, for as little as is known of the deviation.

        Student's quantile by the first term of its expansion around the normal one (M. Abramowitz and I. Stegun,
        *Handbook of Mathematical Functions*, 26.7.5).
        """
        z = self._normal_doubt
        return z + (z**3 + z) / (4 * self.model.freedom)

    def _settled(self, gain: float) -> bool:
        """Whether more measuring would hardly change the plan."""
        return gain + self._doubt * max(self._deviations) < self._min_gain

    # ---- times -----------------------------------------------------------------------------------------------------

    def _learn_communication(self, windows: Sequence[WindowTiming | None]) -> None:
        # all ranks wait for the slowest; what that one waits is the communication itself, which no plan removes
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
        skipped = _SETTLE_STEPS if self._windows_since_change == 0 else 0
        if tuned and step_times and not skipped:
            look_s = max(_LOOK_S, _LOOK_S_A_RANK * plan.world_size)
            apart = math.ceil(look_s / max(self._step_s(step_times, plan), 1e-9))
            skipped = min(max(apart - self._watch_steps, 0), _LONGEST_PAUSE * self._watch_steps)
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
        """Return what a resumed run needs, in plain numbers."""
        return {"initial": list(self.initial.samples), "model": self.model.to_dict()}

    @staticmethod
    def model_of(state: Any) -> StepTimeModel:
        """Return the model that :meth:`to_dict` described.

        Raises:
            ConfigurationError: it is something else.
        """
        return StepTimeModel.from_dict(entry(as_mapping(state, "balance"), "model"))

    @staticmethod
    def initial_of(state: Any) -> BatchPlan:
        """Return the plan with which the run began that :meth:`to_dict` described.

        Raises:
            ConfigurationError: it is something else.
        """
        return BatchPlan(as_ints(entry(as_mapping(state, "balance"), "initial"), "initial"))
