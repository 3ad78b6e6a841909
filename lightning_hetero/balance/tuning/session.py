"""Tune the shares of one training: its phases, which steps count, when the ranks exchange reports, what follows.

Every rank holds a :class:`TuningSession` and tells it of each training step. The session answers with actions: measure,
exchange reports, change the plan. The timing of these actions depends on the steps alone, so all ranks get the same
actions at the same step. Rank zero decides (:meth:`TuningSession.decide`), and every rank follows the decision
(:meth:`TuningSession.follow`).

A session has no clock, sends nothing and prints nothing, so a simulation drives the same object as a training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from statistics import median_low
from typing import Any

from lightning_hetero.balance.batch.caps import limits_of_micro_batches
from lightning_hetero.balance.tuning.actions import (
    Action,
    AdoptSuggestion,
    BeginAgain,
    ChangePlan,
    CloseStep,
    ExchangeReports,
    KeepPlan,
    ShowSpeedUp,
    StartTimer,
    StopTimer,
    WaitForDevice,
)
from lightning_hetero.balance.tuning.change_reason import change_reason
from lightning_hetero.balance.tuning.memory_model import MemoryModel
from lightning_hetero.balance.tuning.rank_report import RankReport, check_agreement
from lightning_hetero.balance.tuning.rebalancer import Decision, Rebalancer, Window
from lightning_hetero.balance.tuning.saved_balance import SavedBalance
from lightning_hetero.balance.tuning.window_judge import WindowJudge
from lightning_hetero.balance.types import BatchLimits, BatchPlan, PlanSchedule, StepTime, WindowTiming

__all__ = ["Phase", "StepFacts", "TuningSession", "TuningSettings", "WindowResult"]

# Number of exchanges by which it is known how long one takes; a single one may have been disturbed.
_EXCHANGES = 5
# Number of steps in the window that measures the effect of the tuning if nothing is watched afterwards.
_REPORT_STEPS = 10
# A running timer costs a little in every step, so it is stopped in pauses of more steps.
_SHORT_PAUSE_STEPS = 2
# An epoch of fewer steps consists mostly of its first one.
_SHORT_EPOCH_STEPS = 3


class Phase(Enum):
    """How far a session has come.

    NEW: the shares are not found, and nothing is measured. TUNING: the shares are searched for. WATCHING: the shares
    are found, and steps are measured to notice drift. TUNED: the shares are found, and nothing is measured.
    """

    NEW = "new"
    TUNING = "tuning"
    WATCHING = "watching"
    TUNED = "tuned"


@dataclass(frozen=True)
class TuningSettings:
    """The user's settings; see ``LoadBalancer``.

    Attributes:
        warmup_steps: Number of training steps before the first measured one.
        tune_steps: Maximum number of training steps in which the shares are searched for.
        min_gain: Minimum predicted gain that justifies other shares than the initial ones.
        watch_steps: Number of training steps per window while watching for drift; 0 to watch nothing.
    """

    warmup_steps: int = 3
    tune_steps: int = 20
    min_gain: float = 0.05
    watch_steps: int = 10


@dataclass(frozen=True)
class StepFacts:
    """The facts about a training step that has just ended; the same on all ranks.

    Attributes:
        step: Number of the step, counted from 0 over all epochs.
        schedule: Plan schedule of the training; None if the training loader is not divided.
        global_samples: Number of samples of all ranks in the step.
        step_in_epoch: Number of the step, counted from 0 in its epoch.
        steps_in_epoch: Number of steps per epoch; infinite if it is not known.
    """

    step: int
    schedule: PlanSchedule | None
    global_samples: int
    step_in_epoch: int
    steps_in_epoch: float


@dataclass(frozen=True)
class WindowResult:
    """The conclusions that rank zero draws from a window.

    Attributes:
        decision: Decision of the rebalancer.
        first_step: First step that no rank has fetched, from which a new plan holds.
        windows: One window per rank if they are shown to the user; otherwise empty.
        predicted_micro_batches: Largest micro-batch that is expected to fit on each rank, in samples, shape
            ``(world_size,)``; None for a rank of which nothing is known.
    """

    decision: Decision
    first_step: int
    windows: tuple[WindowTiming, ...]
    predicted_micro_batches: tuple[int | None, ...]


_DEFAULTS = TuningSettings()


class TuningSession:
    """The tuning of one training, which may consist of several fits.

    Args:
        settings: The user's settings.

    Attributes:
        phase: How far the session has come.
        step_times: Expected step time of each rank; empty before every rank was measured.
        communication_s: Seconds of a step besides the slowest rank's own time.
        windows_before: One window per rank under the plan that was measured first.
        windows_after: One window per rank under the plan that was found.
        changes: Changes of plan, as pairs of the first training step and the plan.
        plan: Latest plan, which holds as soon as every rank has used the batches that it has fetched; None before
            :meth:`begin`.
    """

    def __init__(self, settings: TuningSettings = _DEFAULTS) -> None:
        self.settings = settings
        self.phase = Phase.NEW
        self.step_times: tuple[StepTime, ...] = ()
        self.communication_s = 0.0
        self.windows_before: tuple[WindowTiming, ...] = ()
        self.windows_after: tuple[WindowTiming, ...] = ()
        self.changes: list[tuple[int, BatchPlan]] = []
        self.plan: BatchPlan | None = None
        self._rebalancer: Rebalancer | None = None
        self._memory_model = MemoryModel(0)
        self._saved_balance: dict[str, Any] | None = None
        self._window = Window(0, 1)
        self._exchanges_s: deque[float] = deque(maxlen=_EXCHANGES)
        self._measure_from = self._elapsed_steps = self._kept_steps = 0
        self._timing = False
        self._suggestion: BatchPlan | None = None
        self._judge: WindowJudge[Decision] = WindowJudge(asynchronous=False)
        self._has_changed = False
        self._times_at_last_change: tuple[StepTime, ...] = ()

    @property
    def is_tuned(self) -> bool:
        """Whether the first search for the shares is over."""
        return self.phase in (Phase.WATCHING, Phase.TUNED)

    @property
    def is_running(self) -> bool:
        """Whether steps are measured, now or after a pause."""
        return self.phase in (Phase.TUNING, Phase.WATCHING)

    @property
    def has_nothing_to_do(self) -> bool:
        """Whether a training need not begin the session: the shares are found, and drift is not watched."""
        return self.is_tuned and not self.settings.watch_steps

    # ---- beginning and end -----------------------------------------------------------------------------------------

    def begin(
        self,
        first_step: int,
        schedule: PlanSchedule,
        limits: BatchLimits,
        suggestion: BatchPlan | None = None,
        asynchronous: bool = False,
    ) -> tuple[Action, ...]:
        """Begin to tune, or to watch if an earlier fit or run has tuned the same global batch size.

        Args:
            first_step: The step that is trained next.
            schedule: Plan schedule of the training.
            limits: The limits that every plan must respect.
            suggestion: The plan that the devices' nominal speeds suggest, or None. It is adopted after the first step,
                because that step may show that the shares must stay equal.
            asynchronous: Whether a rank's device works asynchronously to its host; the same on all ranks.
        """
        self._judge = WindowJudge(asynchronous)
        current = schedule.at(first_step)
        saved = self._saved_balance
        if saved is not None and sum(saved["initial"]) != current.global_batch_size:
            saved = self._saved_balance = None
        self.phase = Phase.TUNING if saved is None else Phase.WATCHING
        self.plan = current
        self._rebalancer = Rebalancer(
            initial=current if saved is None else BatchPlan(tuple(saved["initial"])),
            current=current,
            limits=limits,
            min_gain=self.settings.min_gain,
            tune_steps=self.settings.tune_steps,
            watch_steps=self.settings.watch_steps or _REPORT_STEPS,
            model=None if saved is None else Rebalancer.model_of(saved),
        )
        self._memory_model = MemoryModel(current.world_size)
        self._suggestion = None if self.is_tuned or suggestion == current else suggestion
        self._start_window(first_step + self.settings.warmup_steps, self._first_window())
        self._timing = True
        return (StartTimer(),)

    def stop(self) -> None:
        """Stop measuring; the next fit continues from what was learned."""
        if self._rebalancer is not None and self.is_tuned:
            self._saved_balance = self._rebalancer.to_dict()
        self.phase = Phase.TUNED if self.is_tuned else Phase.NEW
        self._rebalancer = None
        self._timing = False

    # ---- a step ----------------------------------------------------------------------------------------------------

    def on_step(self, facts: StepFacts) -> tuple[Action, ...]:
        """Note a training step that has ended, and return what to do now, in order."""
        if not self.is_running:
            return ()
        assert self.plan is not None
        if facts.schedule is None:  # the loader was replaced by one that is not divided
            self.stop()
            return (StopTimer(),)
        if facts.schedule.at(facts.step).global_batch_size != self.plan.global_batch_size:
            self._saved_balance = None  # it was measured with another global batch size
            return (BeginAgain(facts.step + 1),)
        if self._suggestion is not None:
            return (AdoptSuggestion(), CloseStep(keep=False))
        if not self._timing:
            if facts.step + 2 < self._measure_from:  # the step in which a timer starts is not measured whole
                return ()
            self._timing = True
            return (StartTimer(),)
        in_window = facts.step >= self._measure_from
        keep = in_window and self._counts(facts)
        self._elapsed_steps += in_window
        self._kept_steps += keep
        close = CloseStep(keep, window_begins=facts.step + 1 == self._measure_from)
        if self._kept_steps and self._elapsed_steps >= self._window.measured_steps:
            return (close, ExchangeReports())
        return (close, *self._before_step(facts.step + 1))

    def _before_step(self, step: int) -> tuple[Action, ...]:
        return (WaitForDevice(),) if self._window.synchronised and step >= self._measure_from else ()

    def _counts(self, facts: StepFacts) -> bool:
        """Return whether a step counts as measured.

        A ragged batch does not count, because the plan is not made for it. The first step of an epoch may have waited
        for workers to start; it counts only in very short epochs.
        """
        assert self.plan is not None
        whole = facts.global_samples == self.plan.global_batch_size
        return whole and (facts.step_in_epoch > 0 or facts.steps_in_epoch < _SHORT_EPOCH_STEPS)

    def _first_window(self) -> Window:
        assert self._rebalancer is not None
        return replace(self._rebalancer.first_window(), synchronised=self._judge.asynchronous)

    def _start_window(self, first_step: int, window: Window) -> None:
        self._window = window
        self._measure_from = first_step + window.skipped_steps
        self._elapsed_steps = self._kept_steps = 0

    def adopt_suggestion(self, first_step: int) -> tuple[Action, ...]:
        """Follow the plan that the devices' nominal speeds suggest, and continue the tuning from there.

        Args:
            first_step: First step that no rank has fetched.
        """
        plan, self._suggestion = self._suggestion, None
        assert plan is not None
        assert self._rebalancer is not None
        self._rebalancer.current = self.plan = plan
        self.changes.append((first_step, plan))
        self._start_window(first_step + self.settings.warmup_steps, self._first_window())
        reason = "a first guess, from the devices' cores and clocks"
        return (ChangePlan(first_step, plan, reason, self.settings.tune_steps),)

    # ---- a window --------------------------------------------------------------------------------------------------

    def decide(
        self, reports: Sequence[RankReport], limits: BatchLimits, *, memory_limits_shares: bool = True
    ) -> WindowResult:
        """Decide on rank zero what follows from a window.

        Args:
            reports: Report of each rank, shape ``(world_size,)``.
            limits: The limits that every plan must respect.
            memory_limits_shares: Whether each mini-batch must fit into memory as a whole; False if the user has set a
                micro-batch size.

        Raises:
            DivergedRanksError: Some ranks follow other plans, or are at other steps, than the rest.
        """
        check_agreement(reports)
        assert self._rebalancer is not None
        self._memory_model.observe([report.memory if report.memory.samples else None for report in reports])
        predicted = tuple(self._memory_model.most_samples(rank) for rank in range(len(reports)))
        if memory_limits_shares:
            largest = [
                min((n for n in (report.micro_batch_limit or None, most) if n is not None), default=None)
                for report, most in zip(reports, predicted, strict=True)
            ]
            limits = limits_of_micro_batches(limits, largest, self._rebalancer.current.global_batch_size)
        self._rebalancer.set_limits(limits)
        self._exchanges_s.append(min(report.exchange_s for report in reports))  # the last rank has not waited
        self._rebalancer.exchange_s = median_low(self._exchanges_s)
        windows = [report.window for report in reports]
        measured = [window if window.steps else None for window in windows]
        decision = self._judge.judge(self._rebalancer, measured, self._window.synchronised)
        shown = all(window.steps for window in windows) and (not self.windows_before or self._owes_speed_up)
        return WindowResult(decision, first_step_after(reports), tuple(windows) if shown else (), predicted)

    def follow(self, result: WindowResult) -> tuple[Action, ...]:
        """Follow the decision of rank zero, and return what to do now, in order."""
        decision, left = result.decision, self.plan
        assert self._rebalancer is not None
        assert left is not None
        self.step_times, self.communication_s = decision.step_times, decision.communication_s
        self._rebalancer.current = self.plan = decision.plan
        actions: list[Action] = []
        if not self.windows_before:
            self.windows_before = result.windows
        elif self.is_tuned and self._owes_speed_up and result.windows:
            self.windows_after = result.windows
            actions.append(ShowSpeedUp(self.windows_before, self.windows_after))
        if decision.plan != left:
            actions.append(self._change(result, left))
        if decision.tuned and not self._times_at_last_change:
            # while tuning, new estimates correct a guess; only afterwards does a difference mean a change of speed
            self._times_at_last_change = decision.step_times
        if decision.tuned and not self.is_tuned:
            self.phase = Phase.WATCHING
            if not self._has_changed:
                actions.append(KeepPlan(decision.plan, self._why_kept(decision)))
        self._start_window(result.first_step, decision.window)
        if self.has_nothing_to_do and not self._owes_speed_up:
            self.stop()
            actions.append(StopTimer())
        elif decision.window.skipped_steps > _SHORT_PAUSE_STEPS:
            self._timing = False
            actions.append(StopTimer())
        return (*actions, *self._before_step(result.first_step))

    def _change(self, result: WindowResult, left: BatchPlan) -> ChangePlan:
        decision = result.decision
        reason = change_reason(decision.gain, left, self._times_at_last_change, decision.step_times)
        self._times_at_last_change = ()
        self._has_changed = True
        self.changes.append((result.first_step, decision.plan))
        steps_left = 0 if self.is_tuned or decision.tuned else decision.tune_steps_left
        return ChangePlan(result.first_step, decision.plan, reason, steps_left)

    def _why_kept(self, decision: Decision) -> str:
        if decision.step_times:
            return f"no other shares are predicted to be more than {self.settings.min_gain:.0%} faster"
        ranks = ", ".join(map(str, decision.unmeasured_ranks))
        return f"no step of rank {ranks} could be timed, so other shares cannot be judged"

    @property
    def _owes_speed_up(self) -> bool:
        """Whether the speed-up of the tuning is still to be shown to the user."""
        return bool(self._has_changed and self.windows_before and not self.windows_after)

    # ---- checkpoint ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, in plain values."""
        return {
            "finished": self.is_tuned,
            "step_times": [time.to_dict() for time in self.step_times],
            "balance": self._saved_balance if self._rebalancer is None else self._rebalancer.to_dict(),
        }

    def restore(self, saved: SavedBalance) -> None:
        """Continue where an earlier run on the same devices has ended."""
        self.step_times = saved.step_times
        self._saved_balance = None if saved.balance is None else dict(saved.balance)
        self.phase = Phase.TUNED


def first_step_after(reports: Sequence[RankReport]) -> int:
    """Return the first step that no rank has fetched."""
    return max(report.fetched_through for report in reports) + 1
