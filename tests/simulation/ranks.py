"""Simulated ranks that own a tuning session, and perform its actions like the callback on real ranks.

The session alone decides which steps count as measured, when windows end and when plans change.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.tuning.actions import (
    Action,
    AdoptSuggestion,
    BeginAgain,
    ChangePlan,
    CloseStep,
    ExchangeReports,
    StartTimer,
    StopTimer,
    WaitForDevice,
)
from lightning_hetero.balance.tuning.rank_report import RankReport
from lightning_hetero.balance.tuning.session import StepFacts, TuningSession, TuningSettings, WindowResult
from lightning_hetero.balance.tuning.window import summarise
from lightning_hetero.balance.types import BatchLimits, BatchPlan, MemoryReading, PlanSchedule, StepTiming, WindowTiming
from lightning_hetero.distributed.step_timer import StepTimer

__all__ = ["SimulatedRanks"]

_NOTHING_MEASURED = WindowTiming(0, 0, 0.0)
_NOTHING_READ = MemoryReading(0, 0.0, 0.0, 0.0)
_SETTINGS = TuningSettings()


class SimulatedRanks:
    """The ranks of one process group, from its start to its end.

    Args:
        schedule: Plan schedule to begin with.
        limits: The limits that every plan must respect.
        settings: The user's settings.
        asynchronous: Whether devices work asynchronously to their hosts.

    Attributes:
        timers: A timer per rank, if the steps are timed and their timings are not given.
        session: The session, which is the same on all ranks.
        schedule: Plan schedule that the ranks follow.
        micro_batch_limits: Maximum micro-batch size of each rank in samples; None for no limit.
        results: Rank zero's result of each window.
    """

    def __init__(
        self,
        schedule: PlanSchedule,
        limits: BatchLimits,
        settings: TuningSettings = _SETTINGS,
        asynchronous: bool = False,
    ) -> None:
        self.session = TuningSession(settings)
        self.timers: Sequence[StepTimer] = ()
        self._asynchronous = asynchronous
        self.schedule = schedule
        self.micro_batch_limits: list[int | None] = [None] * schedule.plans[0].world_size
        self.results: list[WindowResult] = []
        self._limits = limits
        self._timings: list[list[StepTiming]] = []
        self._step_timings: Sequence[StepTiming | None] = ()
        self._fetched_through: Sequence[int] = ()
        self._step_is_whole = False

    def begin(self, first_step: int, suggestion: BatchPlan | None = None) -> None:
        """Begin to train with step ``first_step``."""
        self._perform(
            self.session.begin(first_step, self.schedule, self._limits, suggestion, asynchronous=self._asynchronous)
        )

    def end_step(
        self, facts: StepFacts, timings: Sequence[StepTiming | None], fetched_through: Sequence[int] | None = None
    ) -> None:
        """Finish a training step.

        Args:
            facts: Facts about the step.
            timings: Measurement of each rank; None for a rank that measured nothing.
            fetched_through: Latest step for which each rank has drawn its samples; by default this one.
        """
        self._step = facts.step
        self._step_timings = timings
        self._fetched_through = (
            [facts.step] * len(self.micro_batch_limits) if fetched_through is None else fetched_through
        )
        self._perform(self.session.on_step(facts))

    def _perform(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case StartTimer() | StopTimer():
                    self._restart_timers(enabled=isinstance(action, StartTimer))
                case WaitForDevice():
                    self._wait_for_devices()
                case CloseStep(keep):
                    self._close_step(keep)
                case BeginAgain(first_step):
                    self.begin(first_step)
                case AdoptSuggestion():
                    self._perform(self.session.adopt_suggestion(max(self._fetched_through) + 1))
                case ExchangeReports():
                    self._exchange_reports()
                case ChangePlan(first_step, plan):
                    assert first_step > max(self._fetched_through), "a rank has drawn samples of that step"
                    self.schedule = self.schedule.with_change(first_step, plan)

    def _wait_for_devices(self) -> None:
        for timer in self.timers:
            timer.wait_for_device()

    def _restart_timers(self, enabled: bool) -> None:
        self._timings = [[] for _ in self.micro_batch_limits]
        self._step_is_whole = False
        for timer in self.timers:
            timer.disable()
            if enabled:
                timer.enable()

    def _close_step(self, keep: bool) -> None:
        for timer, samples in zip(self.timers, self.schedule.at(self._step).samples, strict=bool(self.timers)):
            timer.finish_step(samples, keep)
        # as with a real timer, the step in which it starts is not measured whole
        if keep and self._step_is_whole and not self.timers:
            for timings, timing in zip(self._timings, self._step_timings, strict=True):
                if timing is not None:
                    timings.append(timing)
        self._step_is_whole = True

    def _exchange_reports(self) -> None:
        if self.timers:
            self._timings = [timer.take() for timer in self.timers]
        reports = [
            RankReport(summarise(timings) or _NOTHING_MEASURED, _NOTHING_READ, limit or 0, fetched_through, 0)
            for timings, limit, fetched_through in zip(
                self._timings, self.micro_batch_limits, self._fetched_through, strict=True
            )
        ]
        self._timings = [[] for _ in reports]
        result = self.session.decide(reports, self._limits)
        self.results.append(result)
        self._perform(self.session.follow(result))
