"""Find replicas of a pipeline for unequal ranks: groups of ranks, stages in each, and their parts of the batch.

Given the time of each layer on each rank, the memory that layers need and ranks have, and the links between ranks,
divide the ranks into groups. Each group is a pipeline that holds the whole model and trains on its part of every batch;
at the end of a step the groups average their gradients. One pipeline of all ranks waits long for its first and last
micro-batches, one replica per rank needs memory for the whole model on each, and equal groups wait for the slowest.
:func:`solve_replicas` minimises the time from the start of a step to the last average.

1. Groups are listed without repeating what differs only by ranks that are alike (``grouping``): all of them, up to some
   thousand, or else those that a search finds, in which ranks that differ by a few per cent are alike (``kinds``).
2. Each group gets its stages (``group_solver``), by trying all orders and borders where they are few. Groups that are
   alike are solved once for each number of samples.
3. The batch is divided so that all replicas end their passes together (``division``).
4. The time of the averages is added (``reduction``), first for groupings whose passes end early, until the passes of no
   other grouping end before the best step does.
5. Where averages take longer than the last pass, other borders may let more of them overlap with it, so those of the
   best groupings are moved, and samples with them (``improvement``).
6. If not all groups were compared, ranks change places between those of the best step, as long as it becomes shorter.

HexiScale (MLSys 2026) and FlagScale search unequal pipelines for transformers. Here nothing is known of a model but
times and sizes of its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from random import Random

from lightning_hetero.balance.pipeline.replicas.division import divide_samples
from lightning_hetero.balance.pipeline.replicas.estimate import Estimate
from lightning_hetero.balance.pipeline.replicas.group_solver import GroupSolver, Stages
from lightning_hetero.balance.pipeline.replicas.grouping import Climb, Groups, all_groupings, good_groupings
from lightning_hetero.balance.pipeline.replicas.improvement import improved_plan
from lightning_hetero.balance.pipeline.replicas.kinds import with_fewer_kinds
from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.reduction import reduced_s
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

__all__ = ["ReplicaSolution", "good_solutions", "predict_replicas", "solve_replicas"]

_FEW_RANKS = 8  # of more ranks, those that differ by some per cent are alike while groups are searched
_MANY_RANKS = 48
_DIVIDED = 16  # groupings of many ranks that are compared with real layers
_NEARLY = 1.1  # times the best step: moving borders may make it better
_EXCHANGES = 8  # exchanges of ranks between groups of many ranks that are tried at the end
_REFINED = 5  # groupings of many ranks whose stages are refined
_OF_TWO = 2  # groupings into two that are among the good ones
_IMPROVED = 12  # groupings that are improved with the time for averages in view


@dataclass(frozen=True)
class ReplicaSolution:
    """A plan of replicas and what is predicted for it.

    Attributes:
        plan: The replicas.
        samples: Samples of each replica per step.
        step_s: Seconds per step.
        pipelines_s: Seconds until the last pass of each replica ends.
        bound_s: Seconds per step if no rank ever waited and averages took no time; no plan can beat it.
        is_complete: Whether every grouping was compared, with all stages of each group.
    """

    plan: ReplicaPlan
    samples: tuple[int, ...]
    step_s: float
    pipelines_s: tuple[float, ...]
    bound_s: float
    is_complete: bool = False

    @property
    def reduction_s(self) -> float:
        """Seconds for averages of gradients after the last pass has ended."""
        return self.step_s - max(self.pipelines_s)

    @property
    def of_bound(self) -> float:
        """How much of the speed that no plan can exceed is reached, at most 1."""
        return self.bound_s / self.step_s if self.step_s else 1.0


def solve_replicas(problem: ReplicaProblem) -> ReplicaSolution:
    """Return the replicas with the shortest step that were found.

    Args:
        problem: The layers, the ranks, the links, and the batch.

    Raises:
        ConfigurationError: There are fewer layers than a replica has ranks.
        InfeasiblePlanError: In no grouping do the layers fit into the memory of the ranks.

    Example:
        >>> from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
        >>> from lightning_hetero.balance.pipeline.replicas.solver import solve_replicas
        >>> from lightning_hetero.balance.pipeline.stages import LayerCosts
        >>> costs = LayerCosts.of_speeds([(1.0, 2.0)] * 6, speeds=[3, 1, 1])
        >>> found = solve_replicas(ReplicaProblem(costs, samples=16, micro_batches=4, replicas=2))
        >>> [replica.ranks for replica in found.plan.replicas], found.samples
        ([(0,), (1, 2)], (11, 5))
    """
    return good_solutions(problem, 0)[0]


def good_solutions(problem: ReplicaProblem, most: int) -> list[ReplicaSolution]:
    """Return the best solution, and after it those of some other groupings.

    If the number of replicas is open, one pipeline of all ranks and two groupings into two are among the others.

    Args:
        problem: The layers, the ranks and the links.
        most: How many other groupings to return, besides those into one or two; 0 to return the best solution only.

    Raises:
        InfeasiblePlanError: The layers do not fit into the memory of the ranks.
    """
    if problem.world_size > _FEW_RANKS and not isinstance(problem.replicas, tuple):
        alike = with_fewer_kinds(problem)
        if alike != problem:
            try:
                search = _Search(alike)
                best = _adapted(problem, search.best().plan)
            except InfeasiblePlanError:
                pass  # it may fit with all that each rank has
            else:
                return [best, *(predict_replicas(problem, other.plan) for other in search.others(best, most))]
    search = _Search(problem)
    best = search.best()
    return [best, *search.others(best, most)]


def _adapted(problem: ReplicaProblem, plan: ReplicaPlan) -> ReplicaSolution:
    """Return the better of a plan that was made for similar ranks, improved, and new stages of the same groups."""
    groups = tuple(replica.ranks for replica in plan.replicas)  # the rank of the last stage is the first one
    search = _Search(replace(problem, replicas=groups))
    found = min(search.improved(predict_replicas(problem, plan)), search.best(), key=lambda one: one.step_s)
    return replace(found, plan=ReplicaPlan(tuple(map(_in_order, found.plan.replicas))), is_complete=False)


def _in_order(replica: Replica) -> Replica:
    """Return a replica whose own rank 0 has the last stage, and its rank n stage n - 1, as in a single pipeline."""
    *others, last = (replica.ranks[own] for own in replica.stages.ranks)
    own = (*range(1, len(replica.ranks)), 0)
    return Replica((last, *others), replace(replica.stages, ranks=own), replica.share)


def _is_grouping_of(solution: ReplicaSolution, groups: Groups) -> bool:
    return {frozenset(replica.ranks) for replica in solution.plan.replicas} == {frozenset(group) for group in groups}


def predict_replicas(
    problem: ReplicaProblem, plan: ReplicaPlan, samples: Sequence[int] | None = None
) -> ReplicaSolution:
    """Predict a step of known replicas.

    Args:
        problem: The layers, the ranks and the links.
        plan: The replicas, each with one stage per rank.
        samples: Samples of each replica; None for those of ``plan``.

    Raises:
        ConfigurationError: A rank has several stages, or shares a layer, or the plan is of other ranks or layers.
    """
    if any(replica.stages.num_stages > len(replica.ranks) or replica.stages.lent for replica in plan.replicas):
        raise ConfigurationError("Only replicas with one stage per rank and without shared layers can be predicted.")
    if (plan.world_size, plan.num_layers) != (problem.world_size, problem.num_layers):
        raise ConfigurationError(
            f"The plan must be of the {problem.world_size} ranks and {problem.num_layers} layers of the problem, got"
            f" {plan.world_size} ranks and {plan.num_layers} layers."
        )
    return _predicted(problem, GroupSolver(problem), plan, samples)


def _predicted(
    problem: ReplicaProblem, groups: GroupSolver, plan: ReplicaPlan, samples: Sequence[int] | None = None
) -> ReplicaSolution:
    samples = plan.samples(problem.samples) if samples is None else tuple(samples)
    ends_s = [
        groups.ends_s(replica.ranks, replica.stages, n) if n else (0.0,) * replica.stages.num_stages
        for replica, n in zip(plan.replicas, samples, strict=True)
    ]
    step_s = reduced_s(problem, plan.replicas, ends_s)
    return ReplicaSolution(plan, samples, step_s, tuple(map(max, ends_s)), problem.bound_s)


class _Search:
    def __init__(self, problem: ReplicaProblem) -> None:
        self._problem = problem
        self._groups = GroupSolver(problem)
        self._speeds = [1 / max(sum(row), 1e-12) for row in problem.costs.total_s]
        self._known: list[Groups] = []  # groupings, the most promising first

    def best(self) -> ReplicaSolution:
        groupings, is_complete = self._groupings()
        if not is_complete:
            divided = self._all_divided(groupings)
            divided.sort(key=lambda one: self._solution(*one[1:]).step_s)
            self._known = [*(groups for *_, groups in divided), *self._known]
            groupings = [groups for *_, groups in divided[: self._effort(_REFINED)]]
            if alone := [groups for *_, groups in divided if len(groups) == 1]:
                groupings.append(alone[0])  # it gains most by refining, having the most stages
        self._groups.refine()
        found: list[ReplicaSolution] = []
        divided = self._all_divided(groupings)
        if is_complete:
            self._known = [groups for *_, groups in divided]
        for passes_s, samples, groups in divided:
            if found and passes_s >= min(one.step_s for one in found):
                break
            found.append(self._solution(samples, groups))
        if not found:
            raise self._does_not_fit()
        found.sort(key=lambda one: one.step_s)
        for one in found[:_IMPROVED]:
            if one.reduction_s > 0 and max(one.pipelines_s) < found[0].step_s:
                found.append(self.improved(one))
        best = min(found, key=lambda one: one.step_s)
        if not is_complete:
            best = self._exchanged(best)
        plan = ReplicaPlan(tuple(map(_in_order, best.plan.replicas)))
        return replace(best, plan=plan, is_complete=is_complete and self._groups.is_complete)

    def others(self, best: ReplicaSolution, most: int) -> list[ReplicaSolution]:
        """Return solutions of other groupings that were known when the best one was found."""
        if not most:
            return []
        known = [groups for groups in self._known if not _is_grouping_of(best, groups)]
        wanted = known[:most]
        if self._problem.replicas is None:
            wanted += [groups for groups in known if len(groups) == 1][:1]
            wanted += [groups for groups in known if len(groups) == 2][:_OF_TWO]
        found = []
        for groups in dict.fromkeys(wanted):
            divided = self._divided(groups)
            if divided is not None:
                solution = self._solution(divided[1], groups)
                found.append(replace(solution, plan=ReplicaPlan(tuple(map(_in_order, solution.plan.replicas)))))
        return found

    def improved(self, solution: ReplicaSolution) -> ReplicaSolution:
        """Return a solution with the same groups whose averages end earlier, or the same one."""
        plan = improved_plan(self._problem, self._groups, solution.plan, solution.samples)
        return _predicted(self._problem, self._groups, plan)

    def _exchanged(self, best: ReplicaSolution) -> ReplicaSolution:
        """Exchange ranks between groups of a solution as long as it becomes better."""
        climb = Climb(self._problem, Estimate(self._problem, self._groups), self._counts(), Random(0), same_node=False)
        left, tried = self._effort(_EXCHANGES), set[object]()
        found = True
        while found and left > 0:
            found = False
            for groups in climb.neighbours(tuple(replica.ranks for replica in best.plan.replicas)):
                key = tuple(sorted(map(self._groups.key, groups)))
                if key in tried:
                    continue
                tried.add(key)
                if (left := left - 1) < 0:
                    break
                divided = self._divided(groups)
                if divided is None or divided[0] >= best.step_s:
                    continue
                solution = self._solution(divided[1], groups)
                if solution.step_s < best.step_s * _NEARLY:
                    solution = self.improved(solution)
                if solution.step_s < best.step_s * (1 - 1e-9):
                    best, found = solution, True
                    break
        return best

    def _solution(self, samples: tuple[int, ...], groups: Groups) -> ReplicaSolution:
        """Return the prediction for some groups, whose nodes are in one order if averages then end earlier."""
        found = [self._plan(groups, samples, self._groups.stages)]
        if self._problem.nodes and len(groups) > 1 and any(self._problem.parameter_bytes):
            ways = (partial(self._groups.in_way, way=way) for way in range(self._groups.ways))
            found += [self._plan(groups, samples, way) for way in ways]
        plans = [plan for plan in found if plan is not None]
        return min((_predicted(self._problem, self._groups, plan) for plan in plans), key=lambda one: one.step_s)

    def _groupings(self) -> tuple[list[Groups], bool]:
        problem, wanted = self._problem, self._problem.replicas
        if wanted is not None and not isinstance(wanted, int):
            return [tuple(tuple(group) for group in wanted)], True
        counts = self._counts()
        found = all_groupings(range(problem.world_size), self._groups.label, counts, problem.num_layers)
        if found is not None:
            return found, True
        estimate = Estimate(problem, self._groups)
        self._known = good_groupings(problem, estimate, counts)
        return self._known[: self._effort(_DIVIDED)], False

    def _counts(self) -> range:
        """Return the numbers of replicas that are allowed."""
        problem, wanted = self._problem, self._problem.replicas
        if wanted is not None:
            count = wanted if isinstance(wanted, int) else len(wanted)
            return range(count, count + 1)
        fewest, most = -(-problem.world_size // problem.num_layers), min(problem.world_size, problem.samples)
        if fewest > most:
            raise ConfigurationError(
                f"`samples` must be at least one per replica, and replicas of at most {problem.num_layers} ranks, one"
                f" per layer, are at least {fewest}; got {problem.samples}. Use a larger batch or fewer devices."
            )
        return range(fewest, most + 1)

    def _effort(self, least: int) -> int:
        """Return how many groupings are looked at: of fewer ranks more."""
        return max(least, least * _MANY_RANKS // self._problem.world_size)

    def _all_divided(self, groupings: Sequence[Groups]) -> list[tuple[float, tuple[int, ...], Groups]]:
        """Return when all passes end, and the samples of each group, for groupings that fit; the fastest first."""
        divided = [(*found, groups) for groups in groupings if (found := self._divided(groups)) is not None]
        return sorted(divided, key=lambda one: one[0])

    def _divided(self, groups: Groups) -> tuple[float, tuple[int, ...]] | None:
        """Return when all passes end, and the samples of each group; None if they do not fit."""
        step_s = [partial(self._step_s, group) for group in groups]
        start = [sum(self._speeds[rank] for rank in group) for group in groups]
        samples = divide_samples(step_s, self._problem.samples, start)
        if samples is None:
            return None
        return max(of_group(n) for of_group, n in zip(step_s, samples, strict=True)), samples

    def _step_s(self, group: tuple[int, ...], samples: int) -> float:
        stages = self._groups.stages(group, samples)
        return inf if stages is None else stages.step_s

    def _plan(
        self, groups: Groups, samples: Sequence[int], solve: Callable[[tuple[int, ...], int], Stages | None]
    ) -> ReplicaPlan | None:
        replicas = []
        # rank 0 must be in the first one
        for group, n in sorted(zip(groups, samples, strict=True), key=lambda one: min(one[0])):
            stages = solve(group, n)
            if stages is None:
                return None
            replicas.append(Replica(self._groups.canonical(group), stages.plan, float(n)))
        return ReplicaPlan(tuple(replicas))

    def _does_not_fit(self) -> InfeasiblePlanError:
        memory = self._problem.memory
        assert memory is not None
        held = sum(memory.weights_bytes)
        return InfeasiblePlanError(
            f"Each replica must hold all layers, got {held / 1e9:.3g} GB of parameters, gradients and optimiser state,"
            f" in addition to activations, and budgets of {[float(f'{b / 1e9:.3g}') for b in memory.budgets_bytes]} GB"
            f" per rank. Use fewer replicas, smaller micro-batches, or more devices."
        )
