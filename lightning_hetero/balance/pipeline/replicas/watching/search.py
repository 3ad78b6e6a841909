"""Find better shares and borders for replicas whose ranks, and the order of whose stages, stay as they are.

Other shares alone cost nothing to change to, so the best of them is one of the plans. In the others, layers move too:
within one of the replicas, or within all of them. Where averages of gradients take longer than the last pass, single
samples and layers move as long as the step becomes shorter with them (``reduction``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, permutations
from math import comb, inf

import numpy as np

from lightning_hetero.balance.pipeline.replicas.division import divide_samples
from lightning_hetero.balance.pipeline.replicas.group_times import GroupTimes, Ints
from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.reduction import reduced_s
from lightning_hetero.balance.pipeline.replicas.solver import ReplicaSolution

__all__ = ["PlanSearch"]

_MAX_LISTED = 3_000  # borders of a replica that are timed one by one
_ALONE = 8  # replicas of which each in turn changes its borders alone
_EFFORT = 300  # plans that are timed with averages
_ROUNDS = 50  # of moving one layer, where borders are not listed
_LEAST = 1e-9  # part of a step by which it must become shorter

Ends = tuple[int, ...]


@dataclass(frozen=True)
class _Pipeline:
    """The ranks of one replica's stages, and all borders that it may have; none if there are too many."""

    ranks: tuple[int, ...]
    listed: Ints | None


class PlanSearch:
    """Searches plans for devices of known speed.

    Args:
        problem: The layers, the ranks, the links and the batch.

    Attributes:
        problem: The problem.
    """

    def __init__(self, problem: ReplicaProblem) -> None:
        self.problem = problem
        self._times = GroupTimes(problem)
        self._ends_s: dict[tuple[tuple[int, ...], Ends, int], tuple[float, ...]] = {}
        self._best: dict[tuple[tuple[int, ...], int], tuple[float, Ends]] = {}
        self._pipelines: dict[tuple[int, ...], _Pipeline] = {}

    def step_s(self, plan: ReplicaPlan) -> float:
        """Return the seconds of a step."""
        return reduced_s(self.problem, plan.replicas, self._all_passes_s(plan))

    def solution(self, plan: ReplicaPlan) -> ReplicaSolution:
        """Return what is predicted for a plan."""
        passes_s = tuple(map(max, self._all_passes_s(plan)))
        samples = plan.samples(self.problem.samples)
        return ReplicaSolution(plan, samples, self.step_s(plan), passes_s, self.problem.bound_s)

    def plans(self, plan: ReplicaPlan, *, layers_move: bool) -> tuple[ReplicaPlan, ...]:
        """Return a plan and others that may be faster.

        Args:
            plan: The current plan.
            layers_move: Whether borders may change, and not only shares.
        """
        everyone = range(len(plan.replicas))
        wanted: list[Collection[int]] = [()]
        if layers_move:
            wanted += [everyone, *([(i,) for i in everyone] if 1 < len(everyone) <= _ALONE else [])]
        found = [plan]
        for moving in wanted:
            divided = self._divided(plan, moving)
            if divided is not None:
                found += [divided, self._improved(divided, moving)]
        return tuple(dict.fromkeys(found))

    # ---- times -----------------------------------------------------------------------------------------------------

    def _all_passes_s(self, plan: ReplicaPlan) -> list[tuple[float, ...]]:
        samples = plan.samples(self.problem.samples)
        return [self._passes_s(replica, n) for replica, n in zip(plan.replicas, samples, strict=True)]

    def _passes_s(self, replica: Replica, samples: int) -> tuple[float, ...]:
        """Return when the last pass of each stage of a replica ends."""
        if not samples:
            return (0.0,) * replica.stages.num_stages
        return self._ends_s_of(_ranks_of(replica), replica.stages.ends, samples)

    def _ends_s_of(self, ranks: tuple[int, ...], ends: Ends, samples: int) -> tuple[float, ...]:
        key = ranks, ends, samples
        if key not in self._ends_s:
            found = self._times.ends_s(np.array([ranks]), np.array([ends]), samples)[0]
            self._ends_s[key] = tuple(found.tolist())
        return self._ends_s[key]

    def _fits(self, replica: Replica, samples: int) -> bool:
        memory = self.problem.memory_of(replica.ranks, samples)
        return memory is None or memory.allows(replica.stages)

    def _as_it_is_s(self, replica: Replica, samples: int) -> float:
        """Return the seconds of the passes of a replica; infinity if they do not fit into memory."""
        return max(self._passes_s(replica, samples)) if self._fits(replica, samples) else inf

    # ---- borders ---------------------------------------------------------------------------------------------------

    def _at_best_s(self, replica: Replica, samples: int) -> float:
        """Return the seconds of the passes of a replica with its best borders; infinity if none fit into memory."""
        return self._at_best(replica, samples)[0]

    def _at_best(self, replica: Replica, samples: int) -> tuple[float, Ends]:
        key = _ranks_of(replica), samples
        if key not in self._best:
            now = self._as_it_is_s(replica, samples), replica.stages.ends
            self._best[key] = min(now, self._found(replica, samples), key=lambda one: one[0])
        return self._best[key]

    def _found(self, replica: Replica, samples: int) -> tuple[float, Ends]:
        pipeline = self._pipeline(replica)
        if pipeline.listed is not None:
            return self._fastest(replica, pipeline.listed, samples)
        start = self._times.balanced_ends(pipeline.ranks, samples)
        best = (inf, replica.stages.ends) if start is None else self._fastest(replica, start[np.newaxis], samples)
        for _ in range(_ROUNDS):
            near = list(_moved_by_one(best[1]))
            found = self._fastest(replica, np.array(near), samples) if near else best
            if found[0] >= best[0] * (1 - _LEAST):
                break
            best = found
        return best

    def _fastest(self, replica: Replica, ends: Ints, samples: int) -> tuple[float, Ends]:
        """Return the seconds of the passes with the best of some borders, and these."""
        orders = np.repeat(np.array([_ranks_of(replica)]), len(ends), axis=0)
        times = np.where(
            self._times.fits(orders, ends, samples), self._times.ends_s(orders, ends, samples).max(axis=1), inf
        )
        for i in np.argsort(times, kind="stable"):
            found = tuple(map(int, ends[i]))
            if times[i] == inf or self._fits(_with_ends(replica, found), samples):  # up to the last byte
                return float(times[i]), found
        return inf, replica.stages.ends

    def _pipeline(self, replica: Replica) -> _Pipeline:
        ranks, layers = _ranks_of(replica), self.problem.num_layers
        if ranks not in self._pipelines:
            listed = None
            if comb(layers - 1, len(ranks) - 1) <= _MAX_LISTED:
                listed = np.array([(*inner, layers) for inner in combinations(range(1, layers), len(ranks) - 1)])
            self._pipelines[ranks] = _Pipeline(ranks, listed)
        return self._pipelines[ranks]

    # ---- plans -----------------------------------------------------------------------------------------------------

    def _divided(self, plan: ReplicaPlan, moving: Collection[int]) -> ReplicaPlan | None:
        """Return the plan whose passes end earliest, where some replicas change their borders; None if none fits."""
        step_s: list[Callable[[int], float]] = [
            partial(self._at_best_s if i in moving else self._as_it_is_s, replica)
            for i, replica in enumerate(plan.replicas)
        ]
        now = [max(n, 0.5) for n in plan.samples(self.problem.samples)]
        samples = divide_samples(step_s, self.problem.samples, now)
        if samples is None:
            return None
        return ReplicaPlan(
            tuple(
                replace(_with_ends(one, self._at_best(one, n)[1]) if i in moving else one, share=float(n))
                for i, (one, n) in enumerate(zip(plan.replicas, samples, strict=True))
            )
        )

    def _improved(self, plan: ReplicaPlan, moving: Collection[int]) -> ReplicaPlan:
        """Return a plan whose step is shorter with the averages of gradients in it, or the same one."""
        best_s, left = self.step_s(plan), _EFFORT
        while left > 0 and max(map(max, self._all_passes_s(plan))) < best_s * (1 - _LEAST):
            better: ReplicaPlan | None = None
            for near in self._near(plan, moving):
                if (left := left - 1) < 0:
                    break
                step_s = self.step_s(near)
                if step_s < best_s * (1 - _LEAST):
                    better, best_s = near, step_s
            if better is None:
                break
            plan = better
        return plan

    def _near(self, plan: ReplicaPlan, moving: Collection[int]) -> Iterator[ReplicaPlan]:
        """Yield plans in which one border or the samples of two replicas differ."""
        for i in moving:
            one = plan.replicas[i]
            for ends in _moved_by_one(one.stages.ends):
                yield from self._if_it_fits(plan, {i: _with_ends(one, ends)})
        for giver, taker in permutations(range(len(plan.replicas)), 2):
            one, other = plan.replicas[giver], plan.replicas[taker]
            for count in {1, round(one.share) // 8} - {0}:
                if one.share > count:
                    less, more = replace(one, share=one.share - count), replace(other, share=other.share + count)
                    yield from self._if_it_fits(plan, {giver: less, taker: more})

    def _if_it_fits(self, plan: ReplicaPlan, changed: dict[int, Replica]) -> Iterator[ReplicaPlan]:
        if all(self._fits(replica, round(replica.share)) for replica in changed.values()):
            yield ReplicaPlan(tuple(changed.get(i, replica) for i, replica in enumerate(plan.replicas)))


def _ranks_of(replica: Replica) -> tuple[int, ...]:
    """Return the ranks of the run that have the stages of a replica, the first stage first."""
    return tuple(replica.ranks[own] for own in replica.stages.ranks)


def _with_ends(replica: Replica, ends: Ends) -> Replica:
    return replace(replica, stages=replace(replica.stages, ends=ends))


def _moved_by_one(ends: Ends) -> Iterator[Ends]:
    """Yield borders of which one has moved by a layer."""
    for i in range(len(ends) - 1):
        for moved in (ends[i] - 1, ends[i] + 1):
            if (ends[i - 1] if i else 0) < moved < ends[i + 1]:
                yield (*ends[:i], moved, *ends[i + 1 :])
