"""Search stages and an order of passes for unequal ranks under limits of memory.

Two shapes are tried: one stage per rank, the fastest first, since its passes begin first; and a V, in which one rank
has both ends of the model and so computes at the beginning and at the end of a step, when the others wait.  The borders
between the stages of a shape are found by bisection of the time of a step.  Then list scheduling finds an order, single
layers are moved, and other choices are drawn, until the time is proven to be the best or the effort is spent.  Where
two stages may share a layer, borders move by single micro-batches of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from random import Random

from lightning_hetero.balance.pipeline.orders.borders import WHICH, ends_within, neighbours, plan_at
from lightning_hetero.balance.pipeline.orders.listing import Choices, Listing, Task, bound_s
from lightning_hetero.balance.pipeline.orders.merging import with_whole_passes
from lightning_hetero.balance.pipeline.orders.order import Order
from lightning_hetero.balance.pipeline.simulation import PassTimes
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan

__all__ = ["OrderPlan", "OrderProblem", "most_held_by_default", "plan_order", "straight_shapes", "v_shapes"]

_EFFORT = 60_000  # passes that are scheduled in a search: a few tenths of a second
_BISECTIONS = 40
_PARTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65)  # of its work, that a rank with both ends has in its first stage
_CLOSE = 1.001  # of the bound: nothing is to be gained
_PLAIN = (Choices(), Choices(forward_first=True), Choices(fills=1.0))
_KEPT = 2  # plans that were the best before: splitting may cost them less
_HELD_UNKNOWN = 4  # micro-batches that a rank holds, or two per rank, if its memory is unknown
_NOISES = (0.02, 0.05, 0.1, 0.2, 0.4)


def most_held_by_default(world_size: int, memory: StageMemory | None) -> int | None:
    """Return how many micro-batches a rank may hold at a time; None for as many as its memory allows, if it is known.

    Example:
        >>> from lightning_hetero.balance.pipeline.orders.search import most_held_by_default
        >>> most_held_by_default(3, memory=None)
        6
    """
    return max(_HELD_UNKNOWN, 2 * world_size) if memory is None else None


@dataclass(frozen=True)
class OrderProblem:
    """What a search is about.

    Attributes:
        costs: Time of every layer on every rank, for one micro-batch.
        micro_batches: Number of micro-batches per step.
        last_rank: Rank of the last stage.
        transfer_s: Seconds that a transfer between two ranks takes.
        memory: Memory needs and budgets that a plan must respect; None if unknown.
        most_held: How many micro-batches a rank may hold at a time, if its memory allows it; None for all.
        split: Whether gradients of parameters may be computed later than those of inputs.
        shared: Indices of the layers that two stages may share.
        sharing_s: Seconds per step that it takes two ranks to keep each layer equal if they share it; empty for none.
    """

    costs: LayerCosts
    micro_batches: int
    last_rank: int = 0
    transfer_s: float = 0.0
    memory: StageMemory | None = None
    most_held: int | None = None
    split: bool = False
    shared: tuple[int, ...] = ()
    sharing_s: tuple[float, ...] = ()

    def sharing_of(self, plan: StagePlan) -> float:
        """Return the seconds per step that it takes the ranks to keep equal what they share.

        Borders do so at the same time, but a rank that shares several layers does one after another.
        """
        if not self.sharing_s:
            return 0.0
        shared = {*plan.shared}
        return max(sum(self.sharing_s[i] for i in shared.intersection(plan.layers_of(r))) for r in {*plan.ranks})

    def bound_of(self, plan: StagePlan, task: Task) -> float:
        """Return seconds per step that no order of some stages can beat, given what has to be ordered."""
        return bound_s(task) + self.sharing_of(plan)

    @property
    def limit_s(self) -> float:
        """Seconds per step if no rank ever waited and each did the same part of every layer, by its speed."""
        return self.micro_batches / sum(1 / sum(row) for row in self.costs.total_s)

    def task(self, plan: StagePlan) -> Task | None:
        """Return what has to be ordered; None if the plan leaves a rank no memory for activations."""
        costs, m = self.costs, self.micro_batches
        bytes_of = (1.0,) * costs.num_layers if self.memory is None else self.memory.activations_bytes
        held = tuple(sum(bytes_of[i] for i in plan.held(stage)) for stage in range(plan.num_stages))
        free = (inf,) * plan.world_size if self.memory is None else self.memory.left_bytes(plan)
        full = [sum(held[stage] for stage in plan.stages_of(rank)) for rank in range(plan.world_size)]
        most = self.most_held or m
        caps = tuple(min(cap, most * whole) for cap, whole in zip(free, full, strict=True))
        if any(cap < 0 for cap in caps):
            return None
        stages = [self._times(plan, stage) for stage in range(plan.num_stages)]
        forward, inputs, weights, whole = ([row[kind] for row in stages] for kind in range(4))
        times = PassTimes(forward, inputs, weights, whole if self.splits else ())
        return Task(plan.ranks, times, held, caps, self.transfer_s)

    def _times(self, plan: StagePlan, stage: int) -> list[tuple[float, ...]]:
        """Return the seconds of the passes of a stage for each micro-batch, one row per kind of pass."""
        rank, whole = plan.ranks[stage], plan.layers(stage)
        if not any(plan.lent[max(stage - 1, 0) : stage + 1]):
            return [(seconds,) * self.micro_batches for seconds in self._sums(rank, whole.start, whole.stop)]
        ranges = [plan.layers(stage, i) for i in range(self.micro_batches)]
        return list(zip(*(self._sums(rank, layers.start, layers.stop) for layers in ranges), strict=True))

    def _sums(self, rank: int, start: int, end: int) -> tuple[float, ...]:
        """Return the seconds of a forward pass, of both parts of a backward pass and of a whole one, of some layers."""
        known = self._known_sums
        if (rank, start, end) not in known:
            costs, none = self.costs, ((0.0,) * self.costs.num_layers,) * self.costs.world_size
            parts = (costs.input_s, costs.weight_s) if self.splits else (costs.backward_s, none)
            rows = (costs.forward_s, *parts, costs.backward_s)
            known[rank, start, end] = tuple(sum(of_layers[rank][start:end]) for of_layers in rows)
        return known[rank, start, end]

    @property
    def splits(self) -> bool:
        """Whether backward passes are split."""
        return self.split and bool(self.costs.weight_s)

    @cached_property
    def _known_sums(self) -> dict[tuple[int, int, int], tuple[float, ...]]:
        return {}


@dataclass(frozen=True)
class OrderPlan:
    """Stages with an order of passes.

    Attributes:
        stages: The stages.
        order: The passes of each rank.
        step_s: Predicted seconds per step, with what shared layers cost.
        bound_s: Seconds per step that no order of these stages can beat.
    """

    stages: StagePlan
    order: Order
    step_s: float
    bound_s: float


def plan_order(
    problem: OrderProblem, shapes: Sequence[tuple[int, ...]], seed: int = 0, effort: int | None = None
) -> OrderPlan | None:
    """Return the best stages and order that were found; None if nothing fits into memory.

    The same arguments give the same result, because the effort is counted and not timed.

    Args:
        problem: What the search is about.
        shapes: Ranks of the stages, for each shape that is tried; see :func:`straight_shapes` and :func:`v_shapes`.
        seed: Seed of the random choices.
        effort: Number of passes that may be scheduled; by default such that it takes less than half a second.
    """
    search = _Search(problem, _EFFORT if effort is None else effort)
    # where sharing costs something, whole layers are a start of their own, since a small move away would save nothing
    ways = [problem, replace(problem, shared=())] if any(problem.sharing_s) else [problem]
    starts = {plan for way in ways for shape in shapes for plan in _starts(way, shape) if plan is not None}
    bounds = {plan: problem.bound_of(plan, task) for plan in starts if (task := problem.task(plan)) is not None}
    for plan in sorted(bounds, key=lambda plan: (bounds[plan], plan.ranks, plan.ends, plan.lent)):
        if search.is_worth_it(bounds[plan]):
            search.improve(plan)
    search.vary(Random(seed))
    return search.result()


def straight_shapes(costs: LayerCosts, last_rank: int) -> list[tuple[int, ...]]:
    """Return the ranks of stages if each rank has one: the fastest first, and the slowest first."""
    others = _fastest_first(costs, last_rank)
    return list(dict.fromkeys([(*others, last_rank), (*others[::-1], last_rank)]))


def v_shapes(costs: LayerCosts, last_rank: int) -> list[tuple[int, ...]]:
    """Return the ranks of stages if ``last_rank`` has both ends."""
    others = _fastest_first(costs, last_rank)
    if not others or costs.num_layers < len(others) + 2:
        return []
    return list(dict.fromkeys([(last_rank, *others, last_rank), (last_rank, *others[::-1], last_rank)]))


def _fastest_first(costs: LayerCosts, last_rank: int) -> list[int]:
    return sorted((r for r in range(costs.world_size) if r != last_rank), key=lambda r: sum(costs.total_s[r]))


class _Search:
    """A search, with the best plan so far.

    Args:
        problem: What the search is about.
        effort: Number of passes that may be scheduled.
    """

    def __init__(self, problem: OrderProblem, effort: int) -> None:
        self._problem = problem
        self._left = effort
        self._tried: set[StagePlan] = set()
        self.best: OrderPlan | None = None
        self._before: list[OrderPlan] = []  # what was the best before, the latest first

    def result(self) -> OrderPlan | None:
        """Return the best plan if backward passes are split only where that is useful; until now it cost nothing."""
        if self.best is None or not self._problem.splits:
            return self.best
        found = []
        for plan in [self.best, *self._before]:
            task = self._problem.task(plan.stages)
            assert task is not None
            order, passes_s = with_whole_passes(plan.order, task.times, task.transfer_s)
            found.append(replace(plan, order=order, step_s=passes_s + self._problem.sharing_of(plan.stages)))
        return min(found, key=lambda plan: plan.step_s)

    def is_worth_it(self, least_s: float) -> bool:
        """Return whether a plan with this bound may be better than the best, and effort is left."""
        return self.best is None or (self._left > 0 and least_s < self.best.step_s * (1 - 1e-9))

    def improve(self, plan: StagePlan) -> None:
        """Try a plan, and move single layers as long as it becomes faster."""
        step_s = self._try(plan, inf)
        moved = True
        while moved and self._left > 0:
            moved = False
            for other in neighbours(plan, self._problem.micro_batches, self._problem.shared):
                if other not in self._tried and (other_s := self._try(other, step_s)) < step_s:
                    plan, step_s, moved = other, other_s, True
                    break

    def vary(self, random: Random) -> None:
        """Draw other choices for the best plan until the effort is spent or nothing is to be gained.

        Where layers can be shared, there are too many borders to try all, so some are drawn too.
        """
        problem = self._problem
        while self.best is not None and self._left > 0:
            can_be_better = self.best.step_s > _CLOSE * self.best.bound_s
            can_shift = bool(problem.shared) and self.best.step_s > _CLOSE * problem.limit_s
            if can_shift and (not can_be_better or random.random() < 0.5):
                self._shift(random, self.best.stages)
                continue
            if not can_be_better:
                return
            task = problem.task(self.best.stages)
            assert task is not None
            choices = Choices(
                forward_first=random.random() < 0.3,
                fills=random.choice((0.0, 0.0, 0.5)),
                noise=random.choice(_NOISES),
                random=random,
            )
            self._keep(Listing(task), self.best.stages, self.best.bound_s, choices, self.best.step_s)

    def _shift(self, random: Random, plan: StagePlan) -> None:
        """Move several borders at a time, and improve what comes of it."""
        problem = self._problem
        for _ in range(random.randint(2, 4)):
            self._left -= len(plan.ranks) * problem.micro_batches
            plan = random.choice([plan, *neighbours(plan, problem.micro_batches, problem.shared)])
        if plan not in self._tried:
            self.improve(plan)

    def _try(self, plan: StagePlan, step_s: float) -> float:
        """Return the shortest step of a plan that was found; infinity if it is not shorter than ``step_s``."""
        self._tried.add(plan)
        self._left -= len(plan.ranks) * self._problem.micro_batches // 4  # for the bound
        task = self._problem.task(plan)
        if task is None or not self.is_worth_it(least_s := self._problem.bound_of(plan, task)):
            return inf
        listing, found_s = Listing(task), inf
        for choices in _PLAIN:
            found_s = min(found_s, self._keep(listing, plan, least_s, choices, min(found_s, step_s)))
        return found_s

    def _keep(self, listing: Listing, plan: StagePlan, least_s: float, choices: Choices, step_s: float) -> float:
        self._left -= 2 * plan.num_stages * self._problem.micro_batches
        sharing_s = self._problem.sharing_of(plan)
        found = listing.list(choices, step_s * (1 - 1e-9) - sharing_s)
        if found is None:
            return inf
        order, found_s = found[0], found[1] + sharing_s
        if self.best is None or found_s < self.best.step_s * (1 - 1e-9):
            if self.best is not None:
                self._before = [self.best, *self._before][:_KEPT]
            self.best = OrderPlan(plan, order, found_s, least_s)
        return found_s


def _starts(problem: OrderProblem, ranks: tuple[int, ...]) -> Iterator[StagePlan | None]:
    """Yield stages whose ranks have as much time for their work as the passes before their first leave them."""
    twice = len(ranks) > problem.costs.world_size
    arguments = problem.transfer_s, problem.micro_batches, problem.shared
    for part in _PARTS if twice else (1.0,):
        low, high, found = 0.0, 4 * problem.micro_batches * max(map(sum, problem.costs.total_s)), None
        for _ in range(_BISECTIONS):
            step_s = (low + high) / 2
            ends = ends_within(problem.costs, ranks, part, step_s, *arguments)
            if ends is None:
                low = step_s
            else:
                high, found = step_s, ends
        if found is not None:
            for which in WHICH:
                yield plan_at(ranks, found, which, problem.micro_batches)
