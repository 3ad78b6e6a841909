"""Decide, window after window, whether plans change because devices have become slower or faster.

A plan says which rank has which layers, and with several replicas also how they divide a batch.

Before the first step, every rank has timed every layer. While the training runs, each rank measures what its own passes
take per step. Divided by what they were predicted to take, that is the factor by which its device is slower now. The
layers' times, multiplied by these factors, give new stages (``stage_solver``), with the ranks in the order that they
have, and new shares of replicas (``replicas/watching``). The factors are learned with the model that also learns the
step times of data-parallel ranks (``step_time_model``), in which the predicted time of a stage takes the place of the
mini-batch size.

- Layers move only if the gain exceeds ``min_gain`` beyond doubt: the slowest rank must be slow even if it was measured
  too slow by chance. A large gain is taken at once, a small one only some time after the latest move.
- Layers move only if the remaining steps save more time than the move takes. Otherwise the decision says so, once.
- Where other shares alone are faster, layers move only if that gains more than ``min_gain`` again.
- A layer may take another part of a step within a stage than it took alone. What a stage takes differently right after
  a move is therefore put down to that plan and not to the devices, within limits. Otherwise layers could move to and
  fro between two plans, each of which seems better from the other.
- Stages may run in more than one way, for example in a planned order of passes or as "1f1b". Messages and what else no
  prediction knows may delay one way more than another. So each way has a delay: how many times as long as predicted its
  steps were measured to take. A way that was not tried yet is taken to have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import fmean
from typing import Any, Generic

from typing_extensions import Self

from lightning_hetero.balance.pipeline.moves import moving_s
from lightning_hetero.balance.pipeline.orders.order import Order
from lightning_hetero.balance.pipeline.simulation import pipeline_step_s
from lightning_hetero.balance.pipeline.stage_solver import StageMemory, refine_stages, solve_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StagePlan
from lightning_hetero.balance.pipeline.watched_problem import LEAST_OWN_S, PlanT, WatchedProblem
from lightning_hetero.balance.tuning.rebalancer import (
    COOL_DOWN_WINDOWS,
    LARGE_GAIN,
    SETTLE_STEPS,
    Window,
    doubt_of,
    steps_between_windows,
)
from lightning_hetero.balance.tuning.shrinkage import shrink
from lightning_hetero.balance.tuning.step_time_model import StepTimeModel
from lightning_hetero.balance.types import WindowTiming
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["StageDecision", "StageProblem", "StageRebalancer"]

_UNITS_PER_S = 1e9  # sizes of the model of step times are whole numbers, here nanoseconds
# Within a stage, layers may take so much more or less of a rank's time than alone.
_MOST_BIAS = 1.25
# Stages are solved again when a rank has changed by this fraction of `min_gain`.
_NOTEWORTHY = 0.2
# A step may have been disturbed, so a delay approaches what the latest window shows by this part.
_LEARNED = 0.5
# Of trainings without an end, so many further steps count.
_HORIZON_STEPS = 100_000
# A move that does not pay is proposed again only if the gain becomes larger by this factor.
_LARGER = 1.5


@dataclass(frozen=True)
class StageProblem:
    """What is known about the layers before the first step.

    Attributes:
        costs: Time that each rank took for each layer and one micro-batch.
        micro_batches: Number of micro-batches per step.
        samples: Number of samples per step.
        schedule: Pipeline schedule.
        transfer_s: Seconds that a transfer between two stages takes.
        memory: Memory needs of the layers and budgets of the ranks; None if unknown.
        moving_s: Seconds that each layer takes to move, with its gradients and the state of its optimiser.
    """

    costs: LayerCosts
    micro_batches: int
    samples: int
    schedule: Schedule
    transfer_s: float
    memory: StageMemory | None
    moving_s: tuple[float, ...]

    def step_s(self, plan: StagePlan, factors: Sequence[float]) -> float:
        """Return the seconds of a step on devices that take ``factors`` times as long, shape ``(world_size,)``."""
        times = self.costs.times(factors).of_stages(plan)
        return pipeline_step_s(times, self.micro_batches, self.schedule, self.transfer_s)

    def own_s(self, plan: StagePlan, samples: int | None = None) -> tuple[float, ...]:
        """Return the predicted seconds of the passes of each rank in one step, rank 0 first."""
        part = 1.0 if samples is None else samples / self.samples
        return tuple(max(part * seconds, LEAST_OWN_S) for seconds in self._own_s(plan))

    def _own_s(self, plan: StagePlan) -> tuple[float, ...]:
        times = self.costs.of_stages(plan)
        by_stage = [self.micro_batches * (f + b) for f, b in zip(times.forward_s, times.backward_s, strict=True)]
        return tuple(sum(by_stage[stage] for stage in plan.stages_of(rank)) for rank in range(plan.world_size))

    def changing_s(self, before: StagePlan, after: StagePlan) -> float:
        """Return the seconds that it takes to move layers from one plan to another."""
        return moving_s(before, after, self.moving_s)

    def order_of(self, plan: StagePlan) -> Order | None:  # noqa: ARG002
        """Return None: all plans run in the order of the pipeline schedule."""
        return None

    @property
    def has_ways(self) -> bool:
        """False: all plans run as the pipeline schedule says."""
        return False

    def way_of(self, plan: StagePlan) -> str:  # noqa: ARG002
        """Return the name of the way in which a plan runs; steps of one way are delayed alike."""
        return self.schedule

    def use(self, plan: StagePlan, order: Order | None) -> None:
        """Note the order that a plan is to have."""

    def candidates(
        self,
        plan: StagePlan,
        factors: Sequence[float],
        min_gain: float,  # noqa: ARG002
        delays: Mapping[str, float],  # noqa: ARG002
    ) -> tuple[StagePlan, ...]:
        """Return stages of the same ranks that may be faster on devices that take ``factors`` times as long.

        Args:
            plan: The current stages.
            factors: Factor of each rank, rank 0 first.
            min_gain: Gain below which nothing is to be found.
            delays: How many times as long as predicted the steps of each way take; of other ways, 1.
        """
        costs = self.costs.times(factors)
        starts = [plan]
        try:
            starts.append(solve_stages(costs, self.memory, plan.ranks[-1], plan.ranks))
        except InfeasiblePlanError:  # as long as nothing moves, it is as it was
            return ()
        arguments = (self.micro_batches, self.schedule, self.memory, self.transfer_s)
        refined = [refine_stages(costs, start, *arguments, swaps=False) for start in starts]
        return (*starts, *refined)

    def allows(self, plan: StagePlan, current: StagePlan) -> bool:  # noqa: ARG002
        """Return whether stages that were current before fit into memory."""
        return self.memory is None or self.memory.allows(plan)

    def without_moves(self, plan: StagePlan) -> Self | None:  # noqa: ARG002
        """Return None: only layers can change."""
        return None


@dataclass(frozen=True)
class StageDecision(Generic[PlanT]):
    """The decision on what all ranks do next.

    Attributes:
        plan: The plan to change to, or that would be faster; the current one if there is no better one.
        pays: Whether changing to ``plan`` takes less time than it saves in the remaining steps.
        gain: Predicted gain of ``plan`` over the current one; 0.25 is a quarter more samples/s.
        moving_s: Seconds that changing to ``plan`` takes.
        factors: How many times as long each rank takes as it did before the first step, shape ``(world_size,)``; empty
            until every rank was measured.
        window: The steps to measure next.
        tuned: True, since the first stages are found before the first step.
        order: The passes of each rank under ``plan``, in the form of the problem; None for the pipeline schedule.
        delay: How many times as long as predicted steps have taken, if ``plan`` runs in another way because of that; 1
            otherwise.
    """

    plan: PlanT
    pays: bool
    gain: float
    moving_s: float
    factors: tuple[float, ...]
    window: Window
    tuned: bool = True
    order: Any = None
    delay: float = 1.0


class StageRebalancer(Generic[PlanT]):
    """Decides on the stages and shares of one run; lives on rank 0.

    Args:
        problem: What is known about the layers.
        current: The plan that holds now.
        min_gain: Minimum predicted gain that justifies a move.
        watch_steps: Number of steps of a window.

    Attributes:
        problem: What is known about the layers.
        current: The plan that holds now; set it after a decision that was followed.
        exchange_s: Seconds that an exchange of measurements takes without waiting.
        remaining_steps: Number of steps until the training ends; infinite if it is unknown.
        moving_factor: How many times as long moves take as predicted.
    """

    def __init__(self, problem: WatchedProblem[PlanT], current: PlanT, min_gain: float, watch_steps: int) -> None:
        self.problem = problem
        self.current = current
        self.exchange_s = 0.0
        self.remaining_steps = inf
        self.moving_factor = 1.0
        self._min_gain = min_gain
        self._watch_steps = watch_steps
        self._model = StepTimeModel(current.world_size)
        self._measured: PlanT | None = None  # the plan of the latest window
        self._speeds: tuple[float, ...] = (1.0,) * current.world_size
        self._bias: dict[PlanT, tuple[float, ...]] = {current: (1.0,) * current.world_size}
        self._delays: dict[str, float] = {}
        self._windows_since_change = COOL_DOWN_WINDOWS
        self._declined: dict[PlanT, float] = {}
        self._solved: tuple[PlanT, tuple[float, ...], tuple[PlanT, ...]] | None = None

    @property
    def must_change(self) -> bool:
        """False: what fits into memory when it is found fits later, too."""
        return False

    def follow(self, other: StageRebalancer[PlanT]) -> None:
        """Take over everything but measurements from another rebalancer."""
        if self.problem is not other.problem:
            self.problem, self._solved = other.problem, None  # it knows the orders of all plans that were found
        self.current, self.exchange_s = other.current, other.exchange_s
        self.remaining_steps, self.moving_factor = other.remaining_steps, other.moving_factor
        self._declined = dict(other._declined)
        self._delays = other._delays  # not a copy: what is learned here holds there, too

    def first_window(self) -> Window:
        """Return the first window to measure."""
        return Window(0, self._watch_steps)

    def keep_layers(self) -> bool:
        """Let no layer move from now on; return whether anything else can change."""
        problem = self.problem.without_moves(self.current)
        if problem is None:
            return False
        self.problem, self._solved = problem, None
        return True

    def update(self, windows: Sequence[WindowTiming | None]) -> StageDecision[PlanT]:
        """Learn from the latest window of each rank, shape ``(world_size,)``, and decide."""
        self._observe(windows)
        self._windows_since_change += 1
        if not self._model.ready:
            return self._kept(())
        doubt = doubt_of(self.current.world_size, self._model.freedom)
        sizes = self._model.samples
        times, deviations = shrink(self._model, fmean(sizes), doubt)
        self._speeds = tuple(time.seconds(n) / n * _UNITS_PER_S for time, n in zip(times, sizes, strict=True))
        self._learn_delay(windows)
        now_s = self._step_s(self.current)
        target = self._best(now_s)
        if target is None:
            return self._kept(self._speeds)
        gain, takes_s = now_s / self._step_s(target) - 1, self._moving_s(target)
        least = [1 - min(doubt * deviation, 1.0) for deviation in deviations]
        sure = self._step_s(self.current, least) / self._step_s(target) - 1
        pays, before = self._pays(target, now_s), self.current
        known = not pays and gain <= _LARGER * self._declined.get(target, 0.0)
        if known or not self._worth_it(gain, sure):
            return self._kept(self._speeds)
        if pays:
            self.current, self._windows_since_change = target, 0
        else:
            self._declined[target] = gain
        kept, order = self._kept(self._speeds), self.problem.order_of(target)
        delay = self._delay_of(before) if self.problem.way_of(target) != self.problem.way_of(before) else 1.0
        return replace(kept, plan=target, pays=pays, gain=gain, moving_s=takes_s, order=order, delay=delay)

    def _worth_it(self, gain: float, sure: float) -> bool:
        if gain > LARGE_GAIN and sure > 0:
            return True
        return sure > self._min_gain / 2 and self._windows_since_change > COOL_DOWN_WINDOWS

    def _kept(self, factors: tuple[float, ...]) -> StageDecision[PlanT]:
        settles = self._windows_since_change == 0
        skipped = SETTLE_STEPS
        if factors and not settles:
            step_s = self._step_s(self.current)
            skipped = steps_between_windows(step_s, self._watch_steps, self.current.world_size, self.exchange_s)
        return StageDecision(self.current, True, 0.0, 0.0, factors, Window(skipped, self._watch_steps))

    # ---- times -----------------------------------------------------------------------------------------------------

    def _observe(self, windows: Sequence[WindowTiming | None]) -> None:
        of_size = {w.samples: self.problem.own_s(self.current, w.samples) for w in windows if w is not None}
        own_s = [0.0 if w is None else of_size[w.samples][rank] for rank, w in enumerate(windows)]
        if self._measured not in (None, self.current) and self.current not in self._bias:
            self._bias[self.current] = self._bias_after_change(windows, own_s)
        self._measured = self.current
        bias = self._bias_of(self.current)
        self._model.observe(
            [
                None if w is None else replace(w, samples=max(round(_UNITS_PER_S * s * b), 1))
                for w, s, b in zip(windows, own_s, bias, strict=True)
            ]
        )

    def _bias_after_change(self, windows: Sequence[WindowTiming | None], own_s: Sequence[float]) -> tuple[float, ...]:
        assert self._measured is not None
        found = list(self._bias_of(self._measured))
        for rank, window in enumerate(windows):
            if window is not None:
                expected_s = self._speeds[rank] * own_s[rank]
                found[rank] = min(max(window.own_s / expected_s, 1 / _MOST_BIAS), _MOST_BIAS)
        return tuple(found)

    def _learn_delay(self, windows: Sequence[WindowTiming | None]) -> None:
        """Learn how much longer than predicted steps of the current way take, unless hosts wait for their devices."""
        usual = self.problem.samples
        steps_s = [(w.own_s + w.waiting_s) * usual / w.samples for w in windows if w is not None and w.waiting_s > 0]
        if not steps_s:
            return
        way = self.problem.way_of(self.current)
        found = max(max(steps_s) * self._delay_of(self.current) / self._step_s(self.current), 1.0)
        before = self._delays.get(way, found)
        self._delays[way] = before + _LEARNED * (found - before)

    def _delay_of(self, plan: PlanT) -> float:
        return self._delays.get(self.problem.way_of(plan), 1.0)

    def _bias_of(self, plan: PlanT) -> tuple[float, ...]:
        """Return how many times as long stages take as their layers alone; of unknown plans, as those of this one."""
        return self._bias.get(plan) or self._bias.get(self.current) or (1.0,) * plan.world_size

    def _step_s(self, plan: PlanT, parts: Sequence[float] | None = None) -> float:
        """Return the predicted seconds of a step, where each rank takes only ``parts`` of its time."""
        parts = parts or [1.0] * plan.world_size
        factors = [a * b * c for a, b, c in zip(self._speeds, self._bias_of(plan), parts, strict=True)]
        return self._delay_of(plan) * self.problem.step_s(plan, factors)

    # ---- plans -----------------------------------------------------------------------------------------------------

    def _moving_s(self, plan: PlanT) -> float:
        return self.moving_factor * self.problem.changing_s(self.current, plan)

    def _pays(self, plan: PlanT, now_s: float, step_s: float | None = None) -> bool:
        return self._moving_s(plan) <= self.remaining_steps * (now_s - (step_s or self._step_s(plan)))

    def _best(self, now_s: float) -> PlanT | None:
        """Return the plan with which the training ends soonest; if none pays, the fastest one; None if none gains."""
        steps_s = {plan: self._step_s(plan) for plan in self._candidates()}
        better = [plan for plan, step_s in steps_s.items() if now_s / step_s - 1 > self._min_gain]
        paying = {plan: self._moving_s(plan) for plan in better if self._pays(plan, now_s, steps_s[plan])}
        free_s = min((steps_s[plan] for plan, takes_s in paying.items() if not takes_s), default=inf)
        left = min(self.remaining_steps, _HORIZON_STEPS)
        if paying:
            worth_it = [p for p, takes_s in paying.items() if not takes_s or free_s / steps_s[p] - 1 > self._min_gain]
            return min(worth_it, key=lambda plan: left * steps_s[plan] + paying[plan])
        return min(better, key=steps_s.__getitem__, default=None)

    def _candidates(self) -> tuple[PlanT, ...]:
        delay = self._delay_of(self.current) if self.problem.has_ways else 1.0
        if self._solved is not None:
            current, known, found = self._solved
            now = (*self._speeds, delay)
            near = all(abs(a / b - 1) <= _NOTEWORTHY * self._min_gain for a, b in zip(now, known, strict=True))
            if current == self.current and near:
                return found
        self._solved = self.current, (*self._speeds, delay), self._solve()
        return self._solved[2]

    def _solve(self) -> tuple[PlanT, ...]:
        problem, plan = self.problem, self.current
        factors = [a * b for a, b in zip(self._speeds, self._bias_of(plan), strict=True)]
        found = problem.candidates(plan, factors, self._min_gain, self._delays)
        known = (former for former in self._bias if problem.allows(former, plan))
        return tuple(dict.fromkeys((*found, *known))) if found else ()
