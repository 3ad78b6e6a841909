"""Find the order and the borders of one replica's stages, for a group of ranks and a number of samples.

Where there are few orders and borders, all of them are timed. Otherwise the slowest stage is made as fast as possible
in several orders. Then, after :meth:`GroupSolver.refine`, layers move from stage to stage, and neighbours swap, as long
as the step becomes shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from math import comb, factorial, inf, prod

import numpy as np

from lightning_hetero.balance.pipeline.replicas.group_times import GroupTimes, Ints
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.stages import StagePlan

__all__ = ["GroupKey", "GroupSolver", "Stages"]

GroupKey = tuple[tuple[int, ...], ...]

_FEW_RANKS = 8
_MAX_LISTED = 60_000  # orders times borders that are timed one by one
_MAX_LISTED_OF_MANY = 3_000  # if there are more than a few ranks, and so many groups
_SIMILAR = 1.25  # stages are not searched again for a number of samples that differs by less than this factor
_EFFORT = 200_000_000  # of moving layers: passes that are simulated, in units of what a pass of one plan takes
_EFFORT_OF_PASS = 1_000  # a pass takes as long, however many plans, as this number of plans take in it


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
        ways: Number of ways to order the ranks of any group.
    """

    ways = 6

    def __init__(self, problem: ReplicaProblem) -> None:
        self.is_complete = True
        self._problem, self._times = problem, GroupTimes(problem)
        self._refines, self._left = False, _EFFORT
        few = problem.world_size <= _FEW_RANKS
        self._max_listed = _MAX_LISTED if few else _MAX_LISTED_OF_MANY
        self._lasts = problem.last_ranks
        costs, overheads = problem.costs, problem.overheads
        of_ranks = [costs.forward_s, costs.backward_s]
        of_ranks += [] if overheads is None else [overheads.forward_s, overheads.backward_s]
        budgets = (0.0,) * problem.world_size if problem.memory is None else problem.memory.budgets_bytes
        kinds: dict[object, int] = {}
        self._kinds = [
            # those that must have the last stage are like no others
            kinds.setdefault((rank in self._lasts, budgets[rank], *(rows[rank] for rows in of_ranks)), len(kinds))
            for rank in range(problem.world_size)
        ]
        self._work = [sum(row) for row in costs.total_s]
        self._node_work: dict[int, float] = {}
        for rank, work in enumerate(self._work):
            node = problem.node_of(rank)
            self._node_work[node] = min(work, self._node_work.get(node, inf))
        self._listed: dict[tuple[GroupKey, int], Stages | None] = {}
        self._searched: dict[tuple[GroupKey, int], Stages | None] = {}
        self._near: dict[GroupKey, list[tuple[int, StagePlan]]] = {}
        self._too_many: dict[GroupKey, float] = {}  # samples that have not fitted

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

    def refine(self) -> None:
        """Search stages with more effort from now on."""
        if not self._refines:
            self._refines = True
            self._searched.clear()
            self._near.clear()

    def stages(self, ranks: Iterable[int], samples: int) -> Stages | None:
        """Return the best stages of a group that trains on some samples per step; None if they do not fit."""
        order = self.canonical(ranks)
        if len(order) > self._problem.num_layers:
            return None
        is_listed = self._is_listed(order)
        known, key = self._listed if is_listed else self._searched, (self.key(order), samples)
        if key not in known:
            known[key] = self._of_all(order, samples) if is_listed else self._of_some(order, samples)
        return known[key]

    def in_way(self, ranks: Iterable[int], samples: int, way: int) -> Stages | None:
        """Return stages of a group in an order that is similar in all groups; None if they do not fit."""
        own = self.canonical(ranks)
        order = self._order(own, way)
        ends = self._times.balanced_ends(order, samples)
        return None if ends is None else self._best(own, np.array([order]), ends[np.newaxis], samples)

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
            orders, ends = self._near_by(ranks, plan)
        fits = self._times.fits(orders, ends, samples)
        orders, ends = orders[fits], ends[fits]
        if not len(orders):
            return []
        of_stages = self._times.ends_s(orders, ends, samples)
        times = of_stages.max(axis=1)
        chosen = np.argsort(times, kind="stable")[:most]
        plans = ((self._stage_plan(ranks, orders[i], ends[i]), tuple(of_stages[i].tolist())) for i in chosen)
        return [(found, ends_s) for found, ends_s in plans if max(ends_s) < within_s]

    def fits(self, ranks: Sequence[int], plan: StagePlan, samples: int) -> bool:
        """Return whether stages fit into memory; ``plan`` numbers the ranks in the order given."""
        memory = self._problem.memory_of(ranks, samples)
        return memory is None or memory.allows(plan)

    def ends_s(self, ranks: Sequence[int], plan: StagePlan, samples: int) -> tuple[float, ...]:
        """Return when the last pass of each stage ends; ``plan`` numbers the ranks in the order given."""
        order = np.array([[ranks[own] for own in plan.ranks]])
        return tuple(self._times.ends_s(order, np.array([plan.ends]), samples)[0].tolist())

    # ---- all stages ------------------------------------------------------------------------------------------------

    def _of_all(self, ranks: tuple[int, ...], samples: int) -> Stages | None:
        """Return the best of all stages."""
        return self._best(ranks, *self._all_stages(ranks), samples)

    def _is_listed(self, ranks: tuple[int, ...]) -> bool:
        """Return whether there are few enough stages to time them all."""
        alike = Counter(map(self.label, ranks)).values()
        orders = factorial(len(ranks)) // prod(map(factorial, alike))
        return orders * comb(self._problem.num_layers - 1, len(ranks) - 1) <= self._max_listed

    def _all_stages(self, ranks: tuple[int, ...]) -> tuple[Ints, Ints]:
        """Return the ranks and the ends of all stages."""
        num_layers = self._problem.num_layers
        orders = np.array([order for order in self._orders(ranks[::-1]) if self._lasts.isdisjoint(order[:-1])])
        ends = np.array([(*inner, num_layers) for inner in combinations(range(1, num_layers), len(ranks) - 1)])
        return np.repeat(orders, len(ends), axis=0), np.tile(ends, (len(orders), 1))

    def _orders(self, ranks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Yield the orders of ranks, without those in which ranks that are alike are in another order than here."""
        if not ranks:
            yield ()
        seen = set()
        for i, rank in enumerate(ranks):
            if self.label(rank) not in seen:
                seen.add(self.label(rank))
                yield from ((rank, *rest) for rest in self._orders(ranks[:i] + ranks[i + 1 :]))

    # ---- some stages -----------------------------------------------------------------------------------------------

    def _of_some(self, ranks: tuple[int, ...], samples: int) -> Stages | None:
        """Return the best stages that were found from several orders, or those for a similar number of samples."""
        self.is_complete = False
        key = self.key(ranks)
        if samples >= self._too_many.get(key, inf):
            return None
        for other, plan in self._near.get(key, []):
            alike = min(other, samples) >= self._problem.micro_batches and max(other, samples) <= _SIMILAR * min(
                other, samples
            )
            if alike and self.fits(ranks, plan, samples):
                return Stages(plan, max(self.ends_s(ranks, plan, samples)))
        ways = dict.fromkeys(self._order(ranks, way) for way in range(self.ways))
        starts = [(o, e) for o in ways if (e := self._times.balanced_ends(o, samples)) is not None]
        best = None
        if starts:
            orders, ends = (np.array(values) for values in zip(*starts, strict=True))
            best = self._best(ranks, orders, ends, samples)
            if best is not None and self._refines:
                best = self._refined(ranks, best, samples)
        if best is None:
            self._too_many[key] = samples
        else:
            self._near.setdefault(key, []).append((samples, best.plan))
        return best

    def _order(self, ranks: tuple[int, ...], way: int) -> tuple[int, ...]:
        """Return an order in which ranks of a node stay together: the fastest, the slowest, or the largest first.

        Nodes are in the same order, or in the opposite one, in all groups. The node of rank 0, which has a last stage,
        is last in all of them.
        """
        sizes = self._work if self._problem.memory is None else self._problem.memory.budgets_bytes
        nodes, signs = [self._problem.node_of(rank) for rank in range(self._problem.world_size)], (1, -1)
        within = [self._work, [-work for work in self._work], [-size for size in sizes]][way % 3]
        across = signs[way // 3]
        order = sorted(
            ranks, key=lambda r: (nodes[r] == nodes[0], across * self._node_work[nodes[r]], nodes[r], within[r], -r)
        )
        return tuple(sorted(order, key=self._lasts.__contains__))

    def _refined(self, ranks: tuple[int, ...], best: Stages, samples: int) -> Stages:
        passes = 2 * len(ranks) * min(self._problem.micro_batches, samples)
        while self._left > 0:
            orders, ends = self._near_by(ranks, best.plan)
            self._left -= passes * (len(orders) + _EFFORT_OF_PASS)
            found = self._best(ranks, orders, ends, samples)
            if found is None or found.step_s >= best.step_s * (1 - 1e-9):
                break
            best = found
        return best

    def _near_by(self, ranks: tuple[int, ...], plan: StagePlan) -> tuple[Ints, Ints]:
        order = np.array([ranks[own] for own in plan.ranks])
        return _neighbours(order, np.array(plan.ends), keep_last=not self._lasts.isdisjoint(ranks))

    def _best(self, ranks: tuple[int, ...], orders: Ints, ends: Ints, samples: int) -> Stages | None:
        """Return the fastest of some stages that fit into memory."""
        fits = self._times.fits(orders, ends, samples)
        orders, ends = orders[fits], ends[fits]
        if not len(orders):
            return None
        times = self._times.ends_s(orders, ends, samples).max(axis=1)
        for i in np.argsort(times, kind="stable"):
            plan = self._stage_plan(ranks, orders[i], ends[i])
            if self.fits(ranks, plan, samples):
                return Stages(plan, float(times[i]))
        return None

    @staticmethod
    def _stage_plan(ranks: tuple[int, ...], order: Ints, ends: Ints) -> StagePlan:
        return StagePlan(tuple(ranks.index(rank) for rank in order), tuple(map(int, ends)))


def _neighbours(order: Ints, ends: Ints, *, keep_last: bool) -> tuple[Ints, Ints]:
    """Return stages of which one has given a layer to another, or has changed places with the next one.

    Args:
        order: Rank of each stage.
        ends: Index of the layer after the last layer of each stage.
        keep_last: Whether the last stage keeps its rank.
    """
    size = len(order)
    orders, all_ends = [], []
    sizes = np.diff(ends, prepend=0)
    for giver, taker in permutations(range(size), 2):
        if sizes[giver] > 1:
            moved = ends.copy()
            first, last = min(giver, taker), max(giver, taker)
            moved[first:last] += 1 if taker < giver else -1
            orders.append(order)
            all_ends.append(moved)
    for stage in range(size - 1 - keep_last):
        swapped, sized = order.copy(), sizes.copy()
        swapped[[stage, stage + 1]] = order[[stage + 1, stage]]
        sized[[stage, stage + 1]] = sizes[[stage + 1, stage]]
        orders += [swapped, swapped]
        all_ends += [ends, np.cumsum(sized)]
    if not orders:
        return np.empty((0, size), dtype=np.int64), np.empty((0, size), dtype=np.int64)
    return np.array(orders), np.array(all_ends)
