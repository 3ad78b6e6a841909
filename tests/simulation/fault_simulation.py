"""A training on simulated ranks on a bad day: what the judgement and the division of samples make of faults.

Speeds, timings, memory and the process itself fail as a schedule says that is drawn from a seed; everything behind them
is the code that runs: windows are summarised, judged and limited, plans take effect behind what ranks have read ahead,
and a run that is killed goes on from a state that has been JSON in between.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from simulation.fault_schedule import Fault, FaultKind, FaultSchedule

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.batch.blocks import Blocks
from lightning_hetero.balance.batch.caps import limits_of_micro_batches
from lightning_hetero.balance.tuning.rebalancer import Decision, Rebalancer
from lightning_hetero.balance.tuning.step_time_model import StepTimeModel
from lightning_hetero.balance.tuning.window import summarise
from lightning_hetero.balance.types import BatchLimits, BatchPlan, PlanSchedule, StepTime, StepTiming

__all__ = ["DrawnStep", "FaultRun", "Judgement", "simulate_faults"]

_WARMUP_STEPS = 3
_MIN_GAIN = 0.05
_TUNE_STEPS = 20
# Faults of a clock last so many steps.
_CLOCK_STEPS = 12
_WRONG_TIMES = {"zero": 0.0, "negative": -1.0, "nan": math.nan}


@dataclass(frozen=True)
class DrawnStep:
    """What the ranks drew for a step that was not lost by a kill.

    Attributes:
        step: counted from 0 over all epochs.
        epoch: which one.
        block: which global batch of the epoch.
        global_batch_size: samples of a whole global batch.
        plans: which plan each rank followed when it drew its samples, shape ``(world_size,)``.
    """

    step: int
    epoch: int
    block: int
    global_batch_size: int
    plans: tuple[BatchPlan, ...]


@dataclass(frozen=True)
class Judgement:
    """A decision, and what its plan had to respect.

    Attributes:
        tick: when.
        decision: the decision.
        limits: of its plan.
        global_batch_size: of its plan.
    """

    tick: int
    decision: Decision
    limits: BatchLimits
    global_batch_size: int


@dataclass(frozen=True)
class FaultRun:
    """What became of a run.

    Attributes:
        excess_s: of each tick, how much longer a step under the plan at hand takes than under the best one, both
            without jitter, as a part of the latter.
        grain: how much longer a step may take under a plan that is one multiple of samples off, likewise.
        drawn: the steps whose samples were trained on, in order.
        judgements: all of them.
        resumes: how often the run was started again.
    """

    excess_s: tuple[float, ...]
    grain: tuple[float, ...]
    drawn: tuple[DrawnStep, ...]
    judgements: tuple[Judgement, ...]
    resumes: int

    def ticks_until(self, excess: float, first_tick: int) -> int | None:
        """Return after how many ticks the plan stays within ``excess`` and a multiple of samples; None if never."""
        late = [t for t in range(first_tick, len(self.excess_s)) if self.excess_s[t] > excess + self.grain[t]]
        if not late:
            return 0
        return None if late[-1] == len(self.excess_s) - 1 else late[-1] + 1 - first_tick


def simulate_faults(schedule: FaultSchedule) -> FaultRun:
    """Run a training in which all that happens which ``schedule`` says."""
    return _Training(schedule).run()


class _Training:
    """The state of a run; the names and the order of what happens are those of the callback and the strategy."""

    def __init__(self, schedule: FaultSchedule) -> None:
        self._faults = schedule
        self._rng = random.Random(schedule.seed)
        self._truth = list(schedule.truth)
        self._everyone = [*schedule.truth, *schedule.spares]
        self._passes: list[int | None] = [None] * len(self._everyone)
        self._next_batch = self._batch = schedule.global_batch_size
        self._step = self._epoch = self._block = 0
        self._stalled: dict[int, float] = {}
        self._wrong: dict[int, tuple[int, FaultKind]] = {}
        self._jumped: dict[int, float] = {}
        self._excess: list[float] = []
        self._grain: list[float] = []
        self._drawn: list[DrawnStep] = []
        self._judgements: list[Judgement] = []
        self._resumes = 0
        self._tuned = False
        self._solved: tuple[object, float] = (None, 0.0)
        self._schedule = PlanSchedule.constant(self._plan([1.0] * len(self._truth)))
        self._start_reading()
        self._start_tuning()
        self._saved = self._state()

    def run(self) -> FaultRun:
        faults = list(self._faults.faults)
        for tick in range(self._faults.ticks):
            self._stalled, self._jumped = {}, {}
            while faults and faults[0].tick == tick:
                self._happen(faults.pop(0))
            self._tick(tick)
        return FaultRun(
            tuple(self._excess), tuple(self._grain), tuple(self._drawn), tuple(self._judgements), self._resumes
        )

    # ---- what goes wrong -------------------------------------------------------------------------------------------

    def _happen(self, fault: Fault) -> None:
        rank = fault.rank % len(self._truth)
        if fault.kind in ("speed", "replaced"):
            old = self._everyone[rank]
            self._everyone[rank] = StepTime(old.overhead_s * fault.value, old.seconds_per_sample * fault.value)
            self._truth = self._everyone[: len(self._truth)]
        elif fault.kind == "stall":
            self._stalled[rank] = fault.value
        elif fault.kind == "clock_jump":
            self._jumped[rank] = fault.value
        elif fault.kind == "memory":
            self._passes[rank] = int(fault.value)
        elif fault.kind == "batch":
            self._next_batch = int(fault.value)
        elif fault.kind != "killed":
            self._wrong[rank] = (_CLOCK_STEPS, fault.kind)
        if fault.kind == "killed":
            self._resume(int(fault.value))
        elif fault.kind == "replaced":
            self._resume(len(self._truth))

    def _measured_s(self, rank: int, own_s: float) -> float | None:
        steps, kind = self._wrong.get(rank, (0, "silent"))
        if steps:
            self._wrong[rank] = (steps - 1, kind)
            return _WRONG_TIMES.get(kind)
        return own_s + self._jumped.get(rank, 0.0)

    @property
    def _best_s(self) -> float:
        problem = (tuple(self._truth), self._batch, self._limits)
        if problem != self._solved[0]:
            truth, batch, limits = problem
            self._solved = problem, predicted_step_s(truth, solve_batch(truth, batch, limits, min_samples=1))
        return self._solved[1]

    # ---- a step ----------------------------------------------------------------------------------------------------

    @property
    def _blocks(self) -> Blocks:
        return Blocks(self._faults.samples, self._batch)

    def _tick(self, tick: int) -> None:
        if self._block == len(self._blocks):
            self._epoch, self._block = self._epoch + 1, 0
            self._change_batch()
        step, plan = self._step, self._schedule.at(self._step)
        plans = self._fetch()
        best_s = self._best_s
        self._excess.append(predicted_step_s(self._truth, plan) / best_s - 1)
        multiple = self._faults.batch_multiple
        self._grain.append(multiple * max(time.seconds_per_sample for time in self._truth) / best_s)
        self._drawn.append(DrawnStep(step, self._epoch, self._block, self._batch, plans))
        whole = self._blocks.size_at(self._block) == self._batch
        self._measure(step, plan, keep=whole and (self._block > 0 or len(self._blocks) < 3))
        self._step, self._block = step + 1, self._block + 1
        if self._kept and self._elapsed >= self._measured_steps:
            self._end_window(tick, plan)
        if self._step % self._faults.save_every == 0:
            self._saved = self._state()

    def _fetch(self) -> tuple[BatchPlan, ...]:
        """Let each rank read ahead; return the plan that each had at hand when it drew this step's samples."""
        last = self._step + len(self._blocks) - 1 - self._block  # readers begin anew with each epoch
        for rank, ahead in zip(range(len(self._truth)), self._faults.read_ahead, strict=False):
            while self._fetched_through[rank] < min(self._step + ahead, last):
                self._fetched_through[rank] += 1
                self._fetched[rank][self._fetched_through[rank]] = self._schedule.at(self._fetched_through[rank])
        return tuple(fetched.pop(self._step) for fetched in self._fetched)

    def _measure(self, step: int, plan: BatchPlan, *, keep: bool) -> None:
        own_s = [
            time.seconds(n) * self._faults.jitter.factor(self._rng, rank, step) * self._stalled.get(rank, 1.0)
            for rank, (time, n) in enumerate(zip(self._truth, plan.samples, strict=True))
        ]
        slowest_s = max(own_s)
        in_window = step >= self._measure_from
        for rank, (timings, n, seconds) in enumerate(zip(self._timings, plan.samples, own_s, strict=True)):
            measured_s = self._measured_s(rank, seconds)
            if keep and in_window and measured_s is not None:
                timings.append(StepTiming(n, measured_s, max(slowest_s - measured_s, 0.0)))
        self._elapsed += in_window
        self._kept += keep and in_window

    def _end_window(self, tick: int, plan: BatchPlan) -> None:
        self._rebalancer.limit(self._limits)
        decision = self._rebalancer.update([summarise(timings) for timings in self._timings])
        first_step = max(self._fetched_through) + 1
        if decision.plan != plan:
            self._schedule = self._schedule.with_change(first_step, decision.plan)
        self._tuned = self._tuned or decision.tuned
        self._judgements.append(Judgement(tick, decision, self._limits, self._batch))
        self._start_window(first_step + decision.window.skipped_steps, decision.window.measured_steps)

    # ---- beginnings ------------------------------------------------------------------------------------------------

    @property
    def _limits(self) -> BatchLimits:
        hard = BatchLimits(None, self._faults.batch_multiple)
        return limits_of_micro_batches(hard, self._passes[: len(self._truth)], self._batch)

    def _plan(self, shares: Sequence[float]) -> BatchPlan:
        return proportional_plan(shares, self._batch, BatchLimits(None, self._faults.batch_multiple), min_samples=1)

    def _change_batch(self) -> None:
        """Loaders are made anew with an epoch, maybe with another batch size."""
        if self._next_batch == self._batch:
            return
        self._batch = self._next_batch
        self._schedule = self._schedule.with_change(self._step, self._plan(self._schedule.at(self._step).samples))
        self._start_tuning()

    def _begin_anew(self) -> None:
        self._schedule = PlanSchedule.constant(self._plan([1.0] * len(self._truth)))
        self._start_reading()
        self._start_tuning()

    def _start_reading(self) -> None:
        self._fetched_through = [self._step - 1] * len(self._truth)
        self._fetched: list[dict[int, BatchPlan]] = [{} for _ in self._truth]

    def _start_tuning(self, initial: BatchPlan | None = None, model: StepTimeModel | None = None) -> None:
        current, limits = self._schedule.at(self._step), BatchLimits(None, self._faults.batch_multiple)
        self._tuned = model is not None
        self._rebalancer: Rebalancer = Rebalancer(
            initial or current, current, limits, _MIN_GAIN, _TUNE_STEPS, model=model
        )
        self._start_window(self._step + _WARMUP_STEPS, self._rebalancer.first_window().measured_steps)

    def _start_window(self, first_step: int, measured_steps: int) -> None:
        self._measure_from, self._measured_steps = first_step, measured_steps
        self._elapsed = self._kept = 0
        self._timings: list[list[StepTiming]] = [[] for _ in self._truth]

    # ---- kills -----------------------------------------------------------------------------------------------------

    def _state(self) -> str:
        """Return what is in a checkpoint."""
        return json.dumps(
            {
                "position": [self._step, self._epoch, self._block, self._batch],
                "ranks": len(self._truth),
                "tuned": self._tuned,
                "schedule": self._schedule.to_dict(),
                "balance": self._rebalancer.to_dict(),
            }
        )

    def _resume(self, world_size: int) -> None:
        """Start again from the state saved last, whose later steps are lost, on ``world_size`` ranks."""
        state = json.loads(self._saved)
        self._step, self._epoch, self._block, self._batch = state["position"]
        self._next_batch = self._batch
        self._truth = self._everyone[:world_size]
        self._drawn = [drawn for drawn in self._drawn if drawn.step < self._step]
        self._wrong = {}
        self._resumes += 1
        if not state["tuned"] or state["ranks"] != world_size:
            self._begin_anew()
        else:
            self._schedule = PlanSchedule.from_dict(state["schedule"])
            self._start_reading()
            self._start_tuning(BatchPlan(tuple(state["balance"]["initial"])), Rebalancer.model_of(state["balance"]))
        self._saved = self._state()
