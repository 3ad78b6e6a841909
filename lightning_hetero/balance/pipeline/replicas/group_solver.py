"""Find the order and the borders of one replica's stages, for a group of ranks and a number of samples.

Where there are few orders and borders, all of them are timed. Otherwise the slowest stage is made as fast as possible
(``stage_solver``) in several orders, and then layers move from stage to stage, and neighbours swap, as long as the step
becomes shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, factorial, prod

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.timing import Floats, stage_ends_s
from lightning_hetero.balance.pipeline.stage_solver import solve_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["GroupKey", "GroupSolver", "Stages"]

GroupKey = tuple[tuple[int, ...], ...]

_MAX_LISTED = 12_000  # orders times borders that are timed one by one
_SLACK = 1e-12  # of sums of bytes that are taken in different orders


@dataclass(frozen=True)
class Stages:
    """Stages of a group of ranks.

    Attributes:
        plan: The stages, in the numbering of the group's canonical order.
        step_s: Seconds per step.
    """

    plan: StagePlan
    step_s: float


class GroupSolver:
    """Solves groups of ranks, each kind of group only once.

    Args:
        problem: The problem that the groups belong to.

    Attributes:
        is_complete: Whether all stages of all groups so far were compared.
    """

    def __init__(self, problem: ReplicaProblem) -> None:
        self.is_complete = True
        self._problem = problem
        costs, zero = problem.costs, LayerCosts(*[((0.0,) * problem.num_layers,) * problem.world_size] * 2)
        overheads = problem.overheads or zero
        rows = (costs.forward_s, costs.backward_s, overheads.forward_s, overheads.backward_s)
        # sums over the layers before each one, of each rank
        sums = [np.concatenate([np.zeros((problem.world_size, 1)), np.cumsum(row, axis=1)], axis=1) for row in rows]
        self._forward, self._backward, self._forward_overhead, self._backward_overhead = sums
        self._outputs = np.array([0.0, *(problem.output_bytes or (0.0,) * problem.num_layers)])
        kinds: dict[object, int] = {}
        budgets = problem.memory.budgets_bytes if problem.memory is not None else (0.0,) * problem.world_size
        self._kinds = [
            # rank 0 is like no other: it must have the last stage
            kinds.setdefault((r == 0, *(row[r] for row in rows), budgets[r]), len(kinds))
            for r in range(problem.world_size)
        ]
        self._found: dict[tuple[GroupKey, int], Stages | None] = {}

    def canonical(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Return the ranks of a group in an order in which equal groups have equal ranks one after another."""
        by_node: dict[int, list[int]] = {}
        for rank in sorted(ranks):
            by_node.setdefault(self._problem.node_of(rank), []).append(rank)
        nodes = [sorted(of_node, key=lambda rank: self._kinds[rank]) for of_node in by_node.values()]
        return tuple(r for node in sorted(nodes, key=lambda node: [self._kinds[r] for r in node]) for r in node)

    def key(self, ranks: Iterable[int]) -> GroupKey:
        """Return the same key for groups that differ only in ranks or nodes that are alike."""
        by_node: dict[int, list[int]] = {}
        for rank in ranks:
            by_node.setdefault(self._problem.node_of(rank), []).append(self._kinds[rank])
        return tuple(sorted(tuple(sorted(node)) for node in by_node.values()))

    def label(self, rank: int) -> tuple[int, int]:
        """Return what ranks have in common that may be exchanged: node and kind."""
        return self._problem.node_of(rank), self._kinds[rank]

    def stages(self, ranks: Iterable[int], samples: int) -> Stages | None:
        """Return the best stages of a group that trains on some samples per step; None if they do not fit."""
        order = self.canonical(ranks)
        key = self.key(order), samples
        if key not in self._found:
            self._found[key] = self._solved(order, samples)
        return self._found[key]

    def alternatives(
        self, ranks: tuple[int, ...], plan: StagePlan, samples: int, within_s: float, most: int
    ) -> list[tuple[StagePlan, tuple[float, ...]]]:
        """Return the fastest stages of a group, and when the last pass of each stage ends.

        Args:
            ranks: The ranks of the group.
            plan: Stages that the group has now, in the numbering of ``ranks``.
            samples: Samples of the group per step.
            within_s: Seconds within which the last pass must end.
            most: How many to return at most.
        """
        if self._is_listed(ranks):
            orders, ends = self._all_stages(ranks)
        else:
            orders, ends = _neighbours(np.array([ranks[own] for own in plan.ranks]), np.array(plan.ends))
        fits = self._fits(orders, ends, samples)
        orders, ends = orders[fits], ends[fits]
        if not len(orders):
            return []
        of_stages = self._ends_s(orders, ends, samples)
        times = of_stages.max(axis=1)
        chosen = np.argsort(times, kind="stable")[:most]
        return [
            (self._stage_plan(ranks, orders[i], ends[i]), tuple(of_stages[i].tolist()))
            for i in chosen
            if times[i] < within_s
        ]

    def fits(self, ranks: Sequence[int], plan: StagePlan, samples: int) -> bool:
        """Return whether stages fit into memory; ``plan`` numbers the ranks in the order given."""
        memory = self._problem.memory_of(ranks, samples)
        return memory is None or memory.allows(plan)

    def ends_s(self, ranks: Sequence[int], plan: StagePlan, samples: int) -> tuple[float, ...]:
        """Return when the last pass of each stage ends; ``plan`` numbers the ranks in the order given."""
        order = np.array([[ranks[own] for own in plan.ranks]])
        return tuple(self._ends_s(order, np.array([plan.ends]), samples)[0].tolist())

    # ---- all stages ------------------------------------------------------------------------------------------------

    def _solved(self, ranks: tuple[int, ...], samples: int) -> Stages | None:
        if len(ranks) > self._problem.num_layers:
            return None
        if not self._is_listed(ranks):
            return self._searched(ranks, samples)
        found = self._best(ranks, *self._all_stages(ranks), samples)
        return None if found is None else Stages(*found)

    def _is_listed(self, ranks: tuple[int, ...]) -> bool:
        """Return whether there are few enough stages to time them all."""
        alike = Counter(map(self.label, ranks)).values()
        orders = factorial(len(ranks)) // prod(map(factorial, alike))
        return orders * comb(self._problem.num_layers - 1, len(ranks) - 1) <= _MAX_LISTED

    def _all_stages(self, ranks: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the ranks and the ends of all stages."""
        num_layers = self._problem.num_layers
        orders = np.array([order for order in self._orders(ranks) if 0 not in order[:-1]])
        ends = np.array([(*inner, num_layers) for inner in combinations(range(1, num_layers), len(ranks) - 1)])
        return np.repeat(orders, len(ends), axis=0), np.tile(ends, (len(orders), 1))

    def _orders(self, ranks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Yield the orders of ranks, without those that differ only by ranks that are alike."""
        if not ranks:
            yield ()
        seen = set()
        for i, rank in enumerate(ranks):
            if self.label(rank) not in seen:
                seen.add(self.label(rank))
                yield from ((rank, *rest) for rest in self._orders(ranks[:i] + ranks[i + 1 :]))

    # ---- some stages -----------------------------------------------------------------------------------------------

    def _searched(self, ranks: tuple[int, ...], samples: int) -> Stages | None:
        """Return the best stages that were found from several orders."""
        self.is_complete = False
        problem = self._problem
        costs, memory = self._costs(ranks, samples), problem.memory_of(ranks, samples)
        best: tuple[StagePlan, float] | None = None
        for order in self._good_orders(ranks):
            own = [ranks.index(rank) for rank in order]
            try:
                plan = solve_stages(costs, memory, own[-1], own)
            except InfeasiblePlanError:
                continue
            found = self._improved(ranks, plan, samples)
            if found is not None and (best is None or found[1] < best[1]):
                best = found
        return None if best is None else Stages(*best)

    def _good_orders(self, ranks: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return orders in which ranks of a node stay together, the fastest, the slowest or the largest first."""
        work = np.array(self._problem.costs.total_s).sum(axis=1)
        memory = self._problem.memory
        ways = [work.tolist(), (-work).tolist()]
        if memory is not None:
            ways.append([-size for size in memory.budgets_bytes])
        found = []
        for way in ways:
            by_node: dict[int, list[int]] = {}
            for _, rank in sorted((way[rank], rank) for rank in ranks):
                by_node.setdefault(self._problem.node_of(rank), []).append(rank)
            nodes = sorted(by_node.values(), key=lambda node: 0 in node)
            order = [rank for node in nodes for rank in node if rank != 0]
            found.append((*order, 0) if 0 in ranks else tuple(order))
        return list(dict.fromkeys(found))

    def _improved(self, ranks: tuple[int, ...], plan: StagePlan, samples: int) -> tuple[StagePlan, float] | None:
        best: tuple[StagePlan, float] | None = None
        orders, ends = np.array([[ranks[own] for own in plan.ranks]]), np.array([plan.ends])
        while True:
            found = self._best(ranks, orders, ends, samples)
            if found is None or (best is not None and found[1] >= best[1] * (1 - 1e-9)):
                return best
            best = found
            orders, ends = _neighbours(np.array([ranks[own] for own in best[0].ranks]), np.array(best[0].ends))

    # ---- times -----------------------------------------------------------------------------------------------------

    def _best(
        self, ranks: tuple[int, ...], orders: NDArray[np.int64], ends: NDArray[np.int64], samples: int
    ) -> tuple[StagePlan, float] | None:
        """Return the fastest of some stages that fit into memory, and its time."""
        fits = self._fits(orders, ends, samples)
        orders, ends = orders[fits], ends[fits]
        if not len(orders):
            return None
        times = self._ends_s(orders, ends, samples).max(axis=1)
        for i in np.argsort(times, kind="stable"):
            plan = self._stage_plan(ranks, orders[i], ends[i])
            if self.fits(ranks, plan, samples):
                return plan, float(times[i])
        return None

    @staticmethod
    def _stage_plan(ranks: tuple[int, ...], order: NDArray[np.int64], ends: NDArray[np.int64]) -> StagePlan:
        return StagePlan(tuple(ranks.index(rank) for rank in order), tuple(map(int, ends)))

    def _costs(self, ranks: Sequence[int], samples: int) -> LayerCosts:
        """Return the costs of a group's ranks for one of its micro-batches."""
        factor = self._factor(samples)
        overheads = self._problem.overheads
        rows = []
        for name in ("forward_s", "backward_s"):
            of_all = np.array(getattr(self._problem.costs, name))[list(ranks)] * factor
            if overheads is not None:
                of_all = of_all + np.array(getattr(overheads, name))[list(ranks)]
            rows.append(tuple(tuple(row) for row in of_all.tolist()))
        return LayerCosts(*rows)

    def _factor(self, samples: int) -> float:
        return samples / min(self._problem.micro_batches, samples) / self._problem.micro_batch_size

    def _ends_s(self, orders: NDArray[np.int64], ends: NDArray[np.int64], samples: int) -> Floats:
        """Return when the last pass of each stage ends, for stages with some ranks and ends, one per row."""
        problem, factor = self._problem, self._factor(samples)
        starts = _starts(ends)
        forward, backward, forward_overhead, backward_overhead = (
            sums[orders, ends] - sums[orders, starts]
            for sums in (self._forward, self._backward, self._forward_overhead, self._backward_overhead)
        )
        transfer = factor * self._outputs[ends[:, :-1]]
        nodes = np.array([problem.node_of(rank) for rank in range(problem.world_size)])[orders]
        slow = problem.between if problem.between is not None else problem.within
        transfer = np.where(
            nodes[:, 1:] == nodes[:, :-1],
            problem.within.latency_s + problem.within.seconds_per_byte * transfer,
            slow.latency_s + slow.seconds_per_byte * transfer,
        )
        return stage_ends_s(
            factor * forward + forward_overhead,
            factor * backward + backward_overhead,
            transfer,
            min(problem.micro_batches, samples),
            problem.schedule,
        )

    def _fits(self, orders: NDArray[np.int64], ends: NDArray[np.int64], samples: int) -> NDArray[np.bool_]:
        memory = self._problem.memory_of(range(self._problem.world_size), samples)
        if memory is None:
            return np.ones(len(orders), dtype=np.bool_)
        weights, activations = (
            np.array([0.0, *np.cumsum(sizes)]) for sizes in (memory.weights_bytes, memory.activations_bytes)
        )
        starts = _starts(ends)
        received = np.zeros(self._problem.num_layers + 1)
        received[1 : len(memory.received_bytes)] = memory.received_bytes[:-1]
        needed = weights[ends] - weights[starts] + received[starts] + received[ends]
        needed += np.array(memory.held(ends.shape[1])) * (activations[ends] - activations[starts])
        budgets = np.array(memory.budgets_bytes)[orders]
        return np.asarray((needed <= budgets + _SLACK * (weights[-1] + activations[-1])).all(axis=1))


def _starts(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros((len(ends), 1), dtype=np.int64), ends[:, :-1]], axis=1)


def _neighbours(order: NDArray[np.int64], ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return stages of which one has given a layer to another, or has changed places with the next one."""
    size = len(order)
    orders, all_ends = [], []
    sizes = np.diff(ends, prepend=0)
    for giver in range(size):
        for taker in range(size):
            if giver != taker and sizes[giver] > 1:
                moved = ends.copy()
                if giver < taker:
                    moved[giver:taker] -= 1
                else:
                    moved[taker:giver] += 1
                orders.append(order)
                all_ends.append(moved)
    for stage in range(size - 1):
        if order[stage + 1] != 0:  # rank 0 stays last
            swapped = order.copy()
            swapped[[stage, stage + 1]] = order[[stage + 1, stage]]
            sized = np.diff(ends, prepend=0)
            sized[[stage, stage + 1]] = sized[[stage + 1, stage]]
            orders += [swapped, swapped]
            all_ends += [ends, np.cumsum(sized)]
    if not orders:
        return np.empty((0, size), dtype=np.int64), np.empty((0, size), dtype=np.int64)
    return np.array(orders), np.array(all_ends)
