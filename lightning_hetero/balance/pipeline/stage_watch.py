"""Watch the stages and shares of one training: which steps are measured, when the ranks exchange them, what follows.

Every rank holds a :class:`StageWatch` and tells it of each training step. What it answers depends on the steps alone,
so all ranks get the same answers at the same step. Rank zero decides (:meth:`StageWatch.decide`), and every rank
follows (:meth:`StageWatch.follow`). A watch has no clock, sends nothing and prints nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Generic

from lightning_hetero.balance.pipeline.stage_rebalancer import StageDecision, StageRebalancer
from lightning_hetero.balance.pipeline.watched_problem import PlanT, WatchedProblem
from lightning_hetero.balance.tuning.change_reason import change_reason
from lightning_hetero.balance.tuning.window import summarise
from lightning_hetero.balance.tuning.window_judge import WindowJudge
from lightning_hetero.balance.types import BatchPlan, StepTime, StepTiming, WindowTiming

__all__ = ["StageReport", "StageWatch"]

# In the first steps memory is allocated and kernels are chosen.
_WARMUP_STEPS = 3
# Number of exchanges by which it is known how long one takes; a single one may have been disturbed.
_EXCHANGES = 5
_NOTHING_MEASURED = WindowTiming(0, 0, 0.0)


@dataclass(frozen=True)
class StageReport:
    """The report of one rank on one window.

    Attributes:
        window: Timing of the rank's passes in a step.
        exchange_s: Seconds that the rank has spent on the exchange before this one, waiting included; 0 for the first.
        remaining_steps: Number of steps until the training ends; infinite if it is unknown.
    """

    window: WindowTiming
    exchange_s: float
    remaining_steps: float

    def to_numbers(self) -> list[float]:
        """Return the fields as floating-point numbers, which a collective can send."""
        return [*self.window.to_numbers(), self.exchange_s, self.remaining_steps]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> StageReport:
        """Return the report that :meth:`to_numbers` has encoded."""
        *window, exchange_s, remaining_steps = numbers
        return cls(WindowTiming.from_numbers(window), exchange_s, remaining_steps)


class StageWatch(Generic[PlanT]):
    """The watching of one training.

    Args:
        problem: What was known about the layers before the first step.
        plan: The plan that holds now.
        min_gain: Minimum predicted gain that justifies a move.
        watch_steps: Number of training steps per window.
        asynchronous: Whether a rank's device works asynchronously to its host; the same on all ranks.

    Attributes:
        plan: The plan that holds now.
    """

    def __init__(
        self, problem: WatchedProblem[PlanT], plan: PlanT, min_gain: float, watch_steps: int, *, asynchronous: bool
    ) -> None:
        self.plan = plan
        self._problem = problem
        self._rebalancer = StageRebalancer(problem, plan, min_gain, watch_steps)
        self._judge: WindowJudge[StageDecision[PlanT]] = WindowJudge(asynchronous)
        self._exchanges_s: deque[float] = deque(maxlen=_EXCHANGES)
        self._window = replace(self._rebalancer.first_window(), synchronised=asynchronous)
        self._skips = _WARMUP_STEPS
        self._measured_steps = 0
        self._factors_at_last_change: tuple[float, ...] = ()

    @property
    def measures(self) -> bool:
        """Whether the next training step is measured."""
        return not self._skips and not self.is_due

    @property
    def synchronised(self) -> bool:
        """Whether the host waits for the device before each pass of a measured step."""
        return self._window.synchronised

    @property
    def is_due(self) -> bool:
        """Whether the ranks are to exchange their measurements before the next training step."""
        return self._measured_steps >= self._window.measured_steps

    def step_ended(self) -> None:
        """Note a training step."""
        if self.measures:
            self._measured_steps += 1
        self._skips = max(self._skips - 1, 0)

    def summary(self, timings: Sequence[StepTiming]) -> WindowTiming:
        """Return the summary of this rank's measured steps; ragged batches count only if there are no others."""
        whole = [timing for timing in timings if timing.samples == self._problem.samples]
        return summarise(whole or timings) or _NOTHING_MEASURED

    def decide(self, reports: Sequence[StageReport]) -> StageDecision[PlanT]:
        """Decide on rank zero what follows from a window, given the reports of all ranks, rank 0 first."""
        self._exchanges_s.append(min(report.exchange_s for report in reports))  # the last rank has not waited
        self._rebalancer.exchange_s = median_low(self._exchanges_s)
        self._rebalancer.remaining_steps = reports[0].remaining_steps
        windows = [report.window if report.window.steps else None for report in reports]
        return self._judge.judge(self._rebalancer, windows, self._window.synchronised)

    def follow(self, decision: StageDecision[PlanT], *, refused: bool = False) -> str | None:
        """Follow the decision of rank zero; return the reason if the plan changes, or would be faster if it did.

        Args:
            decision: What rank zero has decided.
            refused: Whether the plan stays all the same, because something cannot move.
        """
        self._window = decision.window
        self._skips, self._measured_steps = decision.window.skipped_steps, 0
        before = self._factors_at_last_change
        if not before:
            self._factors_at_last_change = decision.factors
        if decision.plan == self.plan:
            return None
        ranks = BatchPlan((1,) * self.plan.world_size)
        times = [tuple(StepTime(0.0, factor) for factor in factors) for factors in (before, decision.factors)]
        reason = change_reason(decision.gain, ranks, *times)
        if decision.delay > 1:
            reason = f"steps take {decision.delay:.2f} times as long as predicted; {reason}"
        if refused:
            self._rebalancer.current = self.plan
        elif decision.pays:
            self._problem.use(decision.plan, decision.order)
            self.plan = self._rebalancer.current = decision.plan
            self._factors_at_last_change = decision.factors
        return reason

    def keep_layers(self) -> bool:
        """Let no layer move from now on; return whether anything else can change."""
        return self._rebalancer.keep_layers()

    def moved_in(self, seconds: float, decision: StageDecision[PlanT]) -> None:
        """Learn how long a move has taken."""
        if decision.moving_s > 0:
            self._rebalancer.moving_factor *= seconds / decision.moving_s
