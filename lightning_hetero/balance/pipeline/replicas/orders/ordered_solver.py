"""Find replicas whose passes are planned: groups of ranks, the stages and the order of each, and their samples.

1. ``solver`` finds good groupings with "1f1b" in each replica. If the number of replicas is open, one pipeline of all
   ranks is always among them, and so are two groupings into two.
2. For each group, stages and orders are searched in several ways, with the micro-batches that its samples give, with
   little effort. Alike groups are planned once.
3. Samples are divided again, so that the replicas end together. The time of a replica is taken to be a line.
4. The averages of gradients are added. The best groupings are planned again with more effort.
5. The simplest plan is taken of those that are at most 2 % slower than the best: one pipeline before several, and whole
   passes in one direction before a V and before passes in two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from lightning_hetero.balance.pipeline.orders.choice import NEARLY
from lightning_hetero.balance.pipeline.orders.order import Order
from lightning_hetero.balance.pipeline.replicas.kinds import with_fewer_kinds
from lightning_hetero.balance.pipeline.replicas.orders.group_orders import GroupOrder, OrderTimes
from lightning_hetero.balance.pipeline.replicas.orders.group_planner import WAYS, GroupPlanner, is_v
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.solver import ReplicaSolution, good_solutions

__all__ = ["OrderedReplicas", "solve_ordered_replicas"]

_GROUPINGS = 3  # that are planned besides the best one, one pipeline, and two into two
_EFFORT = 300_000  # passes that are scheduled to compare groupings, and as many again for the best ones: some seconds
_LEAST_EFFORT, _MOST_EFFORT = 500, 20_000  # of one search
_REFINED = 2  # groupings that are planned again
_MOST_REFINED = 60_000  # effort of one search then


@dataclass(frozen=True)
class OrderedReplicas:
    """Replicas and how each of them is run.

    Attributes:
        solution: The replicas, which may have several stages per rank, and what is predicted for them.
        orders: The passes of the ranks of each replica, for as many micro-batches as it may have; None for "1f1b".
        names: Short name of the way in which each replica is run, as those of one pipeline.
        reason: What was compared, for the user.
    """

    solution: ReplicaSolution
    orders: tuple[Order | None, ...]
    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class _Plan:
    """Groups with their orders, and what is predicted for them; the simplest level that has all of their ways."""

    groups: tuple[GroupOrder, ...]
    solution: ReplicaSolution
    level: int

    @property
    def step_s(self) -> float:
        return self.solution.step_s

    @property
    def simplicity(self) -> tuple[bool, int, float]:
        return len(self.groups) > 1, self.level, self.step_s


def solve_ordered_replicas(problem: ReplicaProblem, *, always_v: bool = False) -> OrderedReplicas:
    """Return the simplest replicas with planned orders of those whose step is at most 2 % longer than the shortest.

    Args:
        problem: The layers, the ranks and the links. Backward passes are split if ``costs`` has what their parts take.
        always_v: Whether each replica is to be a V, if it can be one.

    Raises:
        ConfigurationError: There are fewer samples or layers than replicas need.
        InfeasiblePlanError: The layers do not fit into the memory of the ranks.

    Example:
        >>> from lightning_hetero.balance.pipeline.replicas.orders.ordered_solver import solve_ordered_replicas
        >>> from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
        >>> from lightning_hetero.balance.pipeline.stages import LayerCosts
        >>> costs = LayerCosts.of_speeds([(0.01, 0.02)] * 12, speeds=[2, 2, 1, 1])
        >>> problem = ReplicaProblem(costs, samples=32, micro_batches=8, micro_batch_size=2, replicas=((0, 2), (1, 3)))
        >>> found = solve_ordered_replicas(problem)
        >>> found.names, found.solution.samples
        (('v', 'v'), (16, 16))
    """
    return _Search(replace(problem, schedule="1f1b"), always_v=always_v).best()


class _Search:
    def __init__(self, problem: ReplicaProblem, *, always_v: bool) -> None:
        self._problem, self._always_v = problem, always_v
        self._times = OrderTimes(problem)

    def best(self) -> OrderedReplicas:
        solutions = good_solutions(self._problem, _GROUPINGS)
        planner = GroupPlanner(with_fewer_kinds(self._problem))
        searches = 3 * sum(len(solution.plan.replicas) for solution in solutions)
        effort = min(max(_EFFORT // searches, _LEAST_EFFORT), _MOST_EFFORT)
        found = [(solution, self._plans(solution, planner, effort, WAYS[1:])) for solution in solutions]
        found = sorted((pair for pair in found if pair[1]), key=lambda pair: min(one.step_s for one in pair[1]))
        plans = [plan for _, of_grouping in found for plan in of_grouping]
        own = GroupPlanner(self._problem)
        for solution, of_grouping in found[:_REFINED]:
            quickest = min(of_grouping, key=lambda plan: plan.step_s)
            # those that may be taken in the end
            names = [name for name in WAYS[1:] if any(one.name == name for plan in of_grouping for one in plan.groups)]
            if not names:
                continue
            searches = len(names) * len(solution.plan.replicas)
            effort = min(max(_EFFORT // searches, _LEAST_EFFORT), _MOST_REFINED)
            plans += self._plans(quickest.solution, own, effort, names, known=solution)
        shortest_s = min(plan.step_s for plan in plans)
        chosen = min((p for p in plans if p.step_s <= NEARLY * shortest_s), key=lambda plan: plan.simplicity)
        return OrderedReplicas(
            chosen.solution,
            tuple(one.order for one in chosen.groups),
            tuple(one.name for one in chosen.groups),
            _reason(plans, chosen, shortest_s),
        )

    def _plans(
        self,
        divided: ReplicaSolution,
        planner: GroupPlanner,
        effort: int,
        names: Sequence[str],
        known: ReplicaSolution | None = None,
    ) -> list[_Plan]:
        """Return plans of a grouping, with more ways to run its replicas from one to the next.

        Args:
            divided: The replicas and their samples.
            planner: What plans the orders of groups.
            effort: Effort of each search.
            names: Ways to run a group that are searched.
            known: The replicas with which "1f1b" is run; None for those of ``divided``.
        """
        ways: list[list[GroupOrder]] = []
        simple = {frozenset(one.ranks): one for one in (known or divided).plan.replicas}
        for replica, samples in zip(divided.plan.replicas, divided.samples, strict=True):
            one = simple[frozenset(replica.ranks)]
            first = GroupOrder(one.ranks, one.stages)
            others = planner.ways(first, samples, effort, names=names, always=self._always_v)
            if self._always_v:
                others = [other for other in others if is_v(other.name)]
            ways.append(others if self._always_v and others else [first, *others])
        found: list[_Plan] = []
        for level, name in enumerate(WAYS):
            if not all(any(WAYS.index(one.name) <= level for one in of_group) for of_group in ways):
                continue
            if found and not any(one.name == name for of_group in ways for one in of_group):
                continue
            groups = tuple(
                min(
                    (one for one in of_group if WAYS.index(one.name) <= level),
                    key=partial(self._step_s, samples=samples),
                )
                for of_group, samples in zip(ways, divided.samples, strict=True)
            )
            if found and groups == found[-1].groups:
                continue
            solution = self._times.divided(groups, divided.samples)
            if solution is not None:
                found.append(_Plan(groups, solution, max(WAYS.index(one.name) for one in groups)))
        return found

    def _step_s(self, one: GroupOrder, samples: int) -> float:
        return self._times.step_s(one, samples)


def _reason(plans: Sequence[_Plan], chosen: _Plan, shortest_s: float) -> str:
    """Say what was compared, for each number of replicas, and why the chosen one is taken."""
    best: dict[tuple[int, int], _Plan] = {}
    for plan in sorted(plans, key=lambda plan: plan.step_s):
        best.setdefault((len(plan.groups), plan.level), plan)
    best[len(chosen.groups), chosen.level] = chosen
    parts = []
    for count in sorted({count for count, _ in best}):
        known = [(WAYS[level], plan.step_s) for (n, level), plan in sorted(best.items()) if n == count]
        what = "one pipeline" if count == 1 else f"{count} replicas"
        parts.append(f"{what} {', '.join(f'{name} {1e3 * step_s:.0f} ms' for name, step_s in known)}")
    nearly = "" if chosen.step_s <= shortest_s else ", and the simplest within 2 % of the shortest was taken"
    return f"predicted were {'; '.join(parts)}{nearly}"
