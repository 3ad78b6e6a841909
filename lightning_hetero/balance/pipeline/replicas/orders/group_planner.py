"""Plan stages and orders of passes for groups of ranks, each kind of group only once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from lightning_hetero.balance.pipeline.orders.choice import passes_are_short, problem_of_way
from lightning_hetero.balance.pipeline.orders.search import OrderPlan, plan_order
from lightning_hetero.balance.pipeline.replicas.orders.group_orders import GroupOrder, OrderTimes
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem

__all__ = ["WAYS", "GroupPlanner", "is_v"]

WAYS = ("1f1b", "v", "split", "split v")  # the simplest first
_NUMBERS_PER_DOUBLING = 8  # of samples, for which groups are planned apart
_ALIKE = 1.05  # ranks of a group whose times differ by this factor at most may all have the last stage


@dataclass(frozen=True)
class _Found:
    """A way to run a group, of which the ranks are known by their places in its canonical order."""

    places: tuple[int, ...]
    plan: OrderPlan
    name: str


class GroupPlanner:
    """Plans the orders of groups.

    Args:
        problem: The problem that the groups belong to. Groups whose ranks have equal times are planned once.
    """

    def __init__(self, problem: ReplicaProblem) -> None:
        self._problem, self._times = problem, OrderTimes(problem)
        costs, overheads = problem.costs, problem.overheads
        rows = [costs.forward_s, costs.backward_s, costs.input_s, costs.weight_s]
        rows += [] if overheads is None else [overheads.forward_s, overheads.backward_s]
        budgets = (0.0,) * problem.world_size if problem.memory is None else problem.memory.budgets_bytes
        kinds: dict[object, int] = {}
        self._kinds = [
            kinds.setdefault((budgets[rank], *(row[rank] for row in rows if row)), len(kinds))
            for rank in range(problem.world_size)
        ]
        self._work_s = [sum(row) for row in costs.total_s]
        self._splits = any(map(any, costs.weight_s))
        self._known: dict[object, list[_Found]] = {}

    def ways(
        self, known: GroupOrder, samples: int, effort: int, *, names: Sequence[str] = WAYS[1:], always: bool = False
    ) -> list[GroupOrder]:
        """Return ways to run a group with planned orders.

        Args:
            known: The stages with which the group runs "1f1b".
            samples: Samples of the group per step.
            effort: Effort of each search.
            names: The ways that are wanted.
            always: Whether they are wanted even if passes are so short that messages matter.
        """
        ranks = self._canonical(known.ranks)
        names = [name for name in names if self._splits or "split" not in name.split()]
        if len(ranks) == 1 or (
            not always and passes_are_short(self._times.searched(known.ranks, samples).costs, known.stages)
        ):
            return []
        # an order is as good for nearly as many samples, if they fit into memory
        size = samples if self._problem.memory is not None else round(_NUMBERS_PER_DOUBLING * log2(samples))
        key = (tuple(self._kinds[r] for r in ranks), self._nodes(ranks), self._lasts(ranks), size, effort, (*names,))
        if key not in self._known:
            self._known[key] = [
                found
                for last, of_last in self._lasts_and_ways(ranks, names)
                for name in of_last
                if (found := self._planned(ranks, last, samples, effort, name)) is not None
            ]
        return [
            GroupOrder(tuple(ranks[place] for place in one.places), one.plan.stages, one.plan.order, one.name)
            for one in self._known[key]
        ]

    def _planned(self, ranks: tuple[int, ...], last: int, samples: int, effort: int, name: str) -> _Found | None:
        """Return the best plan of a way, if a rank, given by its place, has the last stage."""
        places = (last, *(place for place in range(len(ranks)) if place != last))
        group = tuple(ranks[place] for place in places)
        searched = problem_of_way(self._times.searched(group, samples), name)
        shapes = self._shapes(group, twice=is_v(name))
        plan = plan_order(searched, shapes, effort=effort) if shapes else None
        return None if plan is None else _Found(places, plan, name)

    def _shapes(self, group: tuple[int, ...], *, twice: bool) -> list[tuple[int, ...]]:
        """Return the ranks of the stages, in the group's numbering: the fastest first, and the slowest first.

        Ranks of a node follow each other, and those of the last rank's node come last.
        """
        if len(group) + twice > self._problem.num_layers:
            return []
        node = [self._problem.node_of(rank) for rank in group]
        shapes = []
        for sign in (1, -1):
            others = sorted(
                range(1, len(group)), key=lambda i: (node[i] == node[0], node[i], sign * self._work_s[group[i]])
            )
            shapes.append((0, *others, 0) if twice else (*others, 0))
        return list(dict.fromkeys(shapes))

    def _lasts_and_ways(self, ranks: tuple[int, ...], names: Sequence[str]) -> list[tuple[int, list[str]]]:
        """Return which ranks, by their places, may have the last stage, and in which ways."""
        fixed = self._lasts(ranks)
        if fixed:
            return [(fixed[0], list(names))]
        work_s = [self._work_s[rank] for rank in ranks]
        fastest, slowest = (choose(range(len(ranks)), key=work_s.__getitem__) for choose in (min, max))
        if work_s[slowest] <= _ALIKE * work_s[fastest]:
            return [(fastest, list(names))]
        # a V has both ends on the fastest; otherwise passes of the first stages begin first, so they are the fast ones
        straight = [name for name in names if not is_v(name)]
        return [(fastest, [name for name in names if is_v(name)]), (slowest, straight)]

    def _canonical(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks of a group in an order in which alike groups have alike ranks in the same places."""
        return tuple(sorted(ranks, key=lambda rank: (self._kinds[rank], self._problem.node_of(rank), rank)))

    def _nodes(self, ranks: Sequence[int]) -> tuple[int, ...]:
        known: dict[int, int] = {}
        return tuple(known.setdefault(self._problem.node_of(rank), len(known)) for rank in ranks)

    def _lasts(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the places of the ranks that must have the last stage: of each replica one, or none."""
        return tuple(place for place, rank in enumerate(ranks) if rank in self._problem.last_ranks)


def is_v(name: str) -> bool:
    """Return whether a rank has both ends of the model."""
    return "v" in name.split()
