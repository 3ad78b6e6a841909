"""How one replica is run, and what that takes with any number of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from lightning_hetero.balance.pipeline.orders.choice import problem_of_way
from lightning_hetero.balance.pipeline.orders.listing import Task
from lightning_hetero.balance.pipeline.orders.order import Order, known_order
from lightning_hetero.balance.pipeline.orders.proof import most_held
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, most_held_by_default
from lightning_hetero.balance.pipeline.replicas.division import divide_samples
from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.reduction import reduced_s
from lightning_hetero.balance.pipeline.replicas.solver import ReplicaSolution
from lightning_hetero.balance.pipeline.simulation import simulate_order
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan

__all__ = ["GroupOrder", "OrderTimes"]

_ROUNDS = 2  # of dividing samples
_APART = 8  # the second point of a line is this part of the samples away
_NEARLY_NONE = 1e-9  # share of a replica without samples


@dataclass(frozen=True, eq=False)  # comparing orders of passes would take long
class GroupOrder:
    """The stages of a group of ranks, and how they are run.

    Attributes:
        ranks: The ranks of the group. Its stages number them in this order, from 0; the first one has the last stage.
        stages: The stages.
        order: The passes of each rank, for as many micro-batches as a replica may have; None for "1f1b".
        name: Short name of the way, as those of one pipeline.
    """

    ranks: tuple[int, ...]
    stages: StagePlan
    order: Order | None = None
    name: str = "1f1b"

    def replica(self, samples: float) -> Replica:
        """Return the replica with its part of the batch."""
        return Replica(self.ranks, self.stages, samples)


class OrderTimes:
    """The times and the memory needs of groups of ranks with known orders.

    Args:
        problem: The problem that the groups belong to.
    """

    def __init__(self, problem: ReplicaProblem) -> None:
        self._problem = problem
        self._ends_s: dict[tuple[GroupOrder, int], tuple[float, ...]] = {}
        self._largest: dict[tuple[GroupOrder, int], float] = {}  # micro-batches that fit, by their number

    def searched(self, ranks: tuple[int, ...], samples: int) -> OrderProblem:
        """Return what a search for an order of a group is about.

        Args:
            ranks: The ranks of the group, first the one that has the last stage.
            samples: Samples of the group per step.
        """
        problem, factor = self._problem, self._factor(samples)
        # one time for all borders, until the stages are known
        output_bytes = sum(problem.output_bytes) / problem.num_layers
        around = [*ranks[1:], ranks[0]]
        between_s = [problem.link(pair).transfer_s(factor * output_bytes) for pair in pairwise(around)]
        memory = problem.memory_of(ranks, samples)
        return OrderProblem(
            self._costs(ranks, factor),
            problem.micro_batches,
            transfer_s=sum(between_s) / len(between_s) if between_s else 0.0,
            memory=memory,
            most_held=most_held_by_default(len(ranks), memory),
            split=any(map(any, problem.costs.weight_s)),
        )

    def step_s(self, one: GroupOrder, samples: int) -> float:
        """Return the seconds until the last pass of a group ends; infinity if the samples do not fit into memory."""
        return max(self.ends_s(one, samples)) if self.fits(one, samples) else inf

    def ends_s(self, one: GroupOrder, samples: int) -> tuple[float, ...]:
        """Return for each stage of a group when its rank has finished all of its passes."""
        key = one, samples
        if key not in self._ends_s:
            self._ends_s[key] = self._simulated_s(one, samples) if samples else (0.0,) * one.stages.num_stages
        return self._ends_s[key]

    def own_s(self, one: GroupOrder, samples: int) -> tuple[float, ...]:
        """Return the seconds of all passes of each rank of a group."""
        if not samples:
            return (0.0,) * len(one.ranks)
        order, task = self._order(one, samples), self._task(one, samples)
        return tuple(sum(map(task.times.seconds, own)) for own in order.actions)

    def solution(self, groups: Sequence[GroupOrder], samples: Sequence[int]) -> ReplicaSolution | None:
        """Return what is predicted for some groups with their samples; None if these do not fit into memory."""
        if not all(map(self.fits, groups, samples)):
            return None
        ends_s = list(map(self.ends_s, groups, samples))
        plan = ReplicaPlan(tuple(one.replica(max(n, _NEARLY_NONE)) for one, n in zip(groups, samples, strict=True)))
        step_s = reduced_s(self._problem, plan.replicas, ends_s)
        return ReplicaSolution(plan, tuple(samples), step_s, tuple(map(max, ends_s)), self._problem.bound_s)

    def divided(self, groups: Sequence[GroupOrder], samples: Sequence[int]) -> ReplicaSolution | None:
        """Return what is predicted for groups with the samples with which they end together.

        Args:
            groups: The groups.
            samples: Samples of each of them to begin with.

        Returns:
            The prediction; None if the samples do not fit into memory, neither those nor others that were tried.
        """
        best = self.solution(groups, samples)
        for _ in range(_ROUNDS if len(groups) > 1 else 0):
            lines = [self._line(one, max(n, 1)) for one, n in zip(groups, samples, strict=True)]
            division = divide_samples(lines, self._problem.samples, [max(n, 1) for n in samples])
            found = None if division is None else self.solution(groups, division)
            if division is None or found is None or (best is not None and found.step_s >= best.step_s * (1 - 1e-9)):
                break
            best, samples = found, division
        return best

    def _line(self, one: GroupOrder, known: int) -> Callable[[int], float]:
        """Return a function that gives the seconds of a group with some samples, on a line near what is known."""
        other = known + max(known // _APART, 1)
        here_s, there_s = (max(self.ends_s(one, n)) for n in (known, other))
        slope_s = (there_s - here_s) / (other - known)

        def step_s(samples: int) -> float:
            if min(samples, known) < self._problem.micro_batches:
                return self.step_s(one, samples)
            return here_s + slope_s * (samples - known) if self.fits(one, samples) else inf

        return step_s

    def fits(self, one: GroupOrder, samples: int) -> bool:
        """Return whether the ranks of a group have memory for some samples."""
        memory = self._problem.memory
        if memory is None or not samples:
            return True
        count = self._count(samples)
        if (one, count) not in self._largest:
            self._largest[one, count] = self._largest_that_fits(one, count, memory)
        return -(-samples // count) <= self._largest[one, count]

    def _largest_that_fits(self, one: GroupOrder, count: int, memory: StageMemory) -> float:
        """Return how many samples each of ``count`` micro-batches may have at most; negative if layers do not fit."""
        stages, size = one.stages, self._problem.micro_batch_size
        budgets = tuple(memory.budgets_bytes[rank] for rank in one.ranks)
        received = tuple(n / size for n in memory.received_bytes)
        free = replace(memory, budgets_bytes=budgets, received_bytes=()).left_bytes(stages)
        left = replace(memory, budgets_bytes=budgets, received_bytes=received).left_bytes(stages)
        order = known_order(stages.ranks, count, "1f1b") if one.order is None else one.order.first(count)
        of_stages = [sum(memory.activations_bytes[i] for i in stages.layers(s)) / size for s in range(order.num_stages)]
        needed = [a - b + held for a, b, held in zip(free, left, most_held(order, of_stages), strict=True)]
        rows = list(zip(free, needed, strict=True))
        if any(room < 0 for room, _ in rows):
            return -1.0
        return min((room / n * (1 + 1e-9) for room, n in rows if n > 0), default=inf)

    def _simulated_s(self, one: GroupOrder, samples: int) -> tuple[float, ...]:
        stages, times = one.stages, self._task(one, samples).times
        ends_s = [0.0] * stages.world_size
        for p in simulate_order(self._order(one, samples), times, self._transfers_s(one, samples)).passes:
            rank = stages.ranks[p.stage]
            ends_s[rank] = max(ends_s[rank], p.end_s)
        return tuple(ends_s[rank] for rank in stages.ranks)

    def _task(self, one: GroupOrder, samples: int) -> Task:
        searched = problem_of_way(self.searched(one.ranks, samples), one.name)
        task = replace(searched, memory=None, most_held=None).task(one.stages)
        assert task is not None, "memory does not matter to it"
        return task

    def _order(self, one: GroupOrder, samples: int) -> Order:
        count = self._count(samples)
        return known_order(one.stages.ranks, count, "1f1b") if one.order is None else one.order.first(count)

    def _transfers_s(self, one: GroupOrder, samples: int) -> list[float]:
        problem, factor = self._problem, self._factor(samples)
        ranks = [one.ranks[own] for own in one.stages.ranks]
        sent = [factor * problem.output_bytes[end - 1] if problem.output_bytes else 0.0 for end in one.stages.ends]
        return [problem.link(pair).transfer_s(size) for pair, size in zip(pairwise(ranks), sent, strict=False)]

    def _costs(self, ranks: tuple[int, ...], factor: float) -> LayerCosts:
        """Return what the ranks of a group take for a micro-batch of so many times the known size."""
        known, fixed = self._problem.costs, self._problem.overheads
        rows = []
        for kind in ("forward_s", "backward_s", "input_s", "weight_s"):
            of_all = getattr(known, kind)
            more = () if fixed is None else getattr(fixed, kind)
            none = (0.0,) * known.num_layers
            rows.append(
                tuple(
                    tuple(factor * a + b for a, b in zip(of_all[r], more[r] if more else none, strict=True))
                    for r in ranks
                )
                if of_all
                else ()
            )
        return LayerCosts(*rows)

    def _count(self, samples: int) -> int:
        return min(self._problem.micro_batches, samples)

    def _factor(self, samples: int) -> float:
        return samples / self._count(samples) / self._problem.micro_batch_size
