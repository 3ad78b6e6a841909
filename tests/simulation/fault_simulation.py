"""Simulate a training with faults, to check how the tuning and the division of samples react to them.

Speeds, timings, memory and the process itself fail according to a schedule that is drawn from a seed. The reaction to
the faults is computed by the code of real trainings: the ranks drive a real tuning session, plans take effect after the
batches that ranks have read ahead, and a killed run continues from a state that has been converted to JSON.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from simulation.fault_schedule import Fault, FaultKind, FaultSchedule
from simulation.ranks import SimulatedRanks

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.batch.blocks import Blocks
from lightning_hetero.balance.batch.caps import limits_of_micro_batches
from lightning_hetero.balance.tuning.rebalancer import Decision
from lightning_hetero.balance.tuning.saved_balance import SavedBalance
from lightning_hetero.balance.tuning.session import StepFacts
from lightning_hetero.balance.types import BatchLimits, BatchPlan, DeviceProfile, PlanSchedule, StepTime, StepTiming

__all__ = ["DrawnStep", "FaultRun", "Judged", "simulate_faults"]

# Number of steps that a fault of a clock lasts.
_CLOCK_STEPS = 12
_WRONG_TIMES = {"zero": 0.0, "negative": -1.0, "nan": math.nan}


@dataclass(frozen=True)
class DrawnStep:
    """The samples that the ranks drew for a step that was not lost by a kill.

    Attributes:
        step: Number of the step, counted from 0 over all epochs.
        epoch: Number of the epoch.
        block: Number of the global batch in the epoch.
        global_batch_size: Number of samples in a full global batch.
        plans: Plan that each rank followed when it drew its samples, shape ``(world_size,)``.
    """

    step: int
    epoch: int
    block: int
    global_batch_size: int
    plans: tuple[BatchPlan, ...]


@dataclass(frozen=True)
class Judged:
    """A decision of the session, and the rules that its plan had to keep.

    Attributes:
        tick: Time of the decision.
        decision: The decision.
        limits: Limits that its plan had to respect.
        global_batch_size: Number of samples that its plan had to divide.
    """

    tick: int
    decision: Decision
    limits: BatchLimits
    global_batch_size: int


@dataclass(frozen=True)
class FaultRun:
    """The outcome of a run.

    Attributes:
        excess_s: Relative excess of each tick: how much longer a step takes under the current plan than under the best
            one, both without jitter, over the time under the best one.
        grain: Relative excess that a plan may have which is one multiple of samples off, for each tick.
        drawn: Steps whose samples were trained on, in order.
        judged: All decisions.
        resumes: Number of times that the run was started again.
    """

    excess_s: tuple[float, ...]
    grain: tuple[float, ...]
    drawn: tuple[DrawnStep, ...]
    judged: tuple[Judged, ...]
    resumes: int

    def ticks_until(self, excess: float, first_tick: int) -> int | None:
        """Return how many ticks later the plan stays within ``excess`` and a multiple of samples; None if never."""
        late = [t for t in range(first_tick, len(self.excess_s)) if self.excess_s[t] > excess + self.grain[t]]
        if not late:
            return 0
        return None if late[-1] == len(self.excess_s) - 1 else late[-1] + 1 - first_tick


def simulate_faults(schedule: FaultSchedule) -> FaultRun:
    """Run a training with the faults of ``schedule``."""
    return _Training(schedule).run()


class _Training:
    """The state of a run: its ranks, its position in the data, and its current faults."""

    def __init__(self, schedule: FaultSchedule) -> None:
        self._faults = schedule
        self._rng = random.Random(schedule.seed)
        self._truth = list(schedule.truth)
        self._everyone = [*schedule.truth, *schedule.spares]
        self._largest_micro_batches: list[int | None] = [None] * len(self._everyone)
        self._next_batch = self._batch = schedule.global_batch_size
        self._step = self._epoch = self._block = 0
        self._stalled: dict[int, float] = {}
        self._wrong: dict[int, tuple[int, FaultKind]] = {}
        self._jumped: dict[int, float] = {}
        self._excess: list[float] = []
        self._grain: list[float] = []
        self._drawn: list[DrawnStep] = []
        self._judged: list[Judged] = []
        self._resumes = 0
        self._solved: tuple[object, float] = (None, 0.0)
        self._ranks: SimulatedRanks
        self._fetched_through: list[int]
        self._judged_results: int
        self._start_ranks(None)
        self._saved = self._state()

    def run(self) -> FaultRun:
        faults = list(self._faults.faults)
        for tick in range(self._faults.ticks):
            self._stalled, self._jumped = {}, {}
            while faults and faults[0].tick == tick:
                self._happen(faults.pop(0))
            self._tick(tick)
        return FaultRun(tuple(self._excess), tuple(self._grain), tuple(self._drawn), tuple(self._judged), self._resumes)

    # ---- faults ----------------------------------------------------------------------------------------------------

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
            self._largest_micro_batches[rank] = int(fault.value)
            self._tell_memory()
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
        step, plan = self._step, self._ranks.schedule.at(self._step)
        plans = self._fetch()
        best_s = self._best_s
        self._excess.append(predicted_step_s(self._truth, plan) / best_s - 1)
        multiple = self._faults.batch_multiple
        self._grain.append(multiple * max(time.seconds_per_sample for time in self._truth) / best_s)
        self._drawn.append(DrawnStep(step, self._epoch, self._block, self._batch, plans))
        self._end_step(tick, plan)
        self._step, self._block = step + 1, self._block + 1
        if self._step % self._faults.save_every == 0:
            self._saved = self._state()

    def _fetch(self) -> tuple[BatchPlan, ...]:
        """Let each rank read ahead; return the plan that each rank followed when it drew this step's samples."""
        last = self._step + len(self._blocks) - 1 - self._block  # readers begin again with each epoch
        for rank, ahead in zip(range(len(self._truth)), self._faults.read_ahead, strict=False):
            while self._fetched_through[rank] < min(self._step + ahead, last):
                self._fetched_through[rank] += 1
                following = self._fetched_through[rank]
                self._fetched[rank][following] = self._ranks.schedule.at(following)
        return tuple(fetched.pop(self._step) for fetched in self._fetched)

    def _end_step(self, tick: int, plan: BatchPlan) -> None:
        blocks = self._blocks
        facts = StepFacts(self._step, self._ranks.schedule, blocks.size_at(self._block), self._block, len(blocks))
        self._ranks.end_step(facts, self._timings_of(plan), self._fetched_through)
        for result in self._ranks.results[self._judged_results :]:
            self._judged.append(Judged(tick, result.decision, self._limits, self._batch))
        self._judged_results = len(self._ranks.results)

    def _timings_of(self, plan: BatchPlan) -> list[StepTiming | None]:
        """Return each rank's measurement of this step."""
        own_s = [
            time.seconds(n) * self._faults.jitter.factor(self._rng, rank, self._step) * self._stalled.get(rank, 1.0)
            for rank, (time, n) in enumerate(zip(self._truth, plan.samples, strict=True))
        ]
        slowest_s = max(own_s)
        measured = [self._measured_s(rank, seconds) for rank, seconds in enumerate(own_s)]
        return [
            None if seconds is None else StepTiming(n, seconds, max(slowest_s - seconds, 0.0))
            for n, seconds in zip(plan.samples, measured, strict=True)
        ]

    # ---- beginnings ------------------------------------------------------------------------------------------------

    @property
    def _hard_limits(self) -> BatchLimits:
        return BatchLimits(None, self._faults.batch_multiple)

    @property
    def _limits(self) -> BatchLimits:
        return limits_of_micro_batches(self._hard_limits, self._largest_micro_batches[: len(self._truth)], self._batch)

    def _plan(self, shares: Sequence[float]) -> BatchPlan:
        return proportional_plan(shares, self._batch, self._hard_limits, min_samples=1)

    def _tell_memory(self) -> None:
        self._ranks.micro_batch_limits = self._largest_micro_batches[: len(self._truth)]

    def _change_batch(self) -> None:
        """Change to loaders of another batch size if one is due at this epoch."""
        if self._next_batch != self._batch:
            self._batch, schedule = self._next_batch, self._ranks.schedule
            self._ranks.schedule = schedule.with_change(self._step, self._plan(schedule.at(self._step).samples))

    def _start_ranks(self, saved: SavedBalance | None) -> None:
        """Start the ranks, from ``saved`` if it is not None."""
        schedule = PlanSchedule.constant(self._plan([1.0] * len(self._truth))) if saved is None else saved.schedule
        self._ranks = SimulatedRanks(schedule, self._hard_limits)
        self._tell_memory()
        self._judged_results = 0
        self._fetched_through = [self._step - 1] * len(self._truth)
        self._fetched: list[dict[int, BatchPlan]] = [{} for _ in self._truth]
        if saved is not None:
            self._ranks.session.restore(saved)
        self._ranks.begin(self._step)

    # ---- kills -----------------------------------------------------------------------------------------------------

    @property
    def _profiles(self) -> list[DeviceProfile]:
        return [DeviceProfile("host", f"cuda:{rank}", "one model") for rank in range(len(self._truth))]

    def _state(self) -> str:
        """Return the content of a checkpoint."""
        balance = {
            "devices": [profile.name for profile in self._profiles],
            "schedule": self._ranks.schedule.to_dict(),
            **self._ranks.session.to_dict(),
        }
        return json.dumps({"position": [self._step, self._epoch, self._block, self._batch], "balance": balance})

    def _resume(self, world_size: int) -> None:
        """Start again from the latest saved state on ``world_size`` ranks; later steps are lost."""
        state = json.loads(self._saved)
        self._step, self._epoch, self._block, self._batch = state["position"]
        self._next_batch = self._batch
        self._truth = self._everyone[:world_size]
        self._drawn = [drawn for drawn in self._drawn if drawn.step < self._step]
        self._wrong = {}
        self._resumes += 1
        saved = SavedBalance.from_dict(state["balance"])
        self._start_ranks(saved if saved is not None and saved.is_of(self._profiles) else None)
        self._saved = self._state()
