"""Predict steps of replicas on devices that change, and say which plans may be faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from typing_extensions import Self

from lightning_hetero.balance.pipeline.moves import moving_s
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.solver import ReplicaSolution
from lightning_hetero.balance.pipeline.replicas.watching.search import PlanSearch
from lightning_hetero.balance.pipeline.watched_problem import LEAST_OWN_S

__all__ = ["KnownReplicas", "WatchedReplicas", "on_devices"]

_KNOWN = 8  # speeds of devices for which what was computed is kept


@dataclass(frozen=True)
class KnownReplicas:
    """What is known about the layers of replicas before the first step, whatever the order of their passes.

    The ranks of each replica, and the order of its stages, stay as they are, and so does the way in which it is run.

    Attributes:
        measured: The layers, the ranks, the links, and the batch.
        moving_s: Seconds that each layer takes to move, with its gradients and the state of its optimiser.
        layers_move: Whether layers can move; if not, only shares change.
    """

    measured: ReplicaProblem
    moving_s: tuple[float, ...]
    layers_move: bool = field(default=True, kw_only=True)

    @property
    def samples(self) -> int:
        """Number of samples per step."""
        return self.measured.samples

    def changing_s(self, before: ReplicaPlan, after: ReplicaPlan) -> float:
        """Return the seconds that it takes to move layers from one plan to another; 0 if only shares change."""
        return moving_s(before, after, self.moving_s)

    @property
    def has_ways(self) -> bool:
        """False: each replica keeps its way."""
        return False

    def without_moves(self, plan: ReplicaPlan) -> Self | None:
        """Return the problem for layers that cannot move; None if there is one pipeline, which has no shares."""
        return None if len(plan.replicas) == 1 else replace(self, layers_move=False)


@dataclass(frozen=True)
class WatchedReplicas(KnownReplicas):
    """What is known about replicas that run as the pipeline schedule says."""

    _searches: dict[tuple[float, ...], PlanSearch] = field(default_factory=dict, repr=False, compare=False)

    def step_s(self, plan: ReplicaPlan, factors: Sequence[float]) -> float:
        """Return the seconds of a step on devices that take ``factors`` times as long, shape ``(world_size,)``."""
        return self._search(factors).step_s(plan)

    def solution(self, plan: ReplicaPlan, factors: Sequence[float]) -> ReplicaSolution:
        """Return what is predicted for a plan on devices that take ``factors`` times as long."""
        return self._search(factors).solution(plan)

    def own_s(self, plan: ReplicaPlan, samples: int | None = None) -> tuple[float, ...]:
        """Return the predicted seconds of the passes of each rank in one step, rank 0 first."""
        problem = self.measured
        costs, overheads = problem.costs.total_s, None if problem.overheads is None else problem.overheads.total_s
        own_s = [LEAST_OWN_S] * plan.world_size
        divided = plan.trained_samples(problem.samples if samples is None else samples)
        for replica, n in zip(plan.replicas, divided, strict=True):
            passes = min(problem.micro_batches, n)
            for own, rank in enumerate(replica.ranks):
                layers = replica.stages.layers_of(own)
                seconds = n / problem.micro_batch_size * sum(costs[rank][i] for i in layers)
                seconds += 0.0 if overheads is None else passes * sum(overheads[rank][i] for i in layers)
                own_s[rank] = max(seconds, LEAST_OWN_S)
        return tuple(own_s)

    def order_of(self, plan: ReplicaPlan) -> None:
        """Return None: all plans run in the order of the pipeline schedule."""

    def way_of(self, plan: ReplicaPlan) -> str:  # noqa: ARG002
        """Return the name of the pipeline schedule."""
        return self.measured.schedule

    def use(self, plan: ReplicaPlan, order: None) -> None:
        """Note the order that a plan is to have: that of the pipeline schedule."""

    def candidates(
        self,
        plan: ReplicaPlan,
        factors: Sequence[float],
        min_gain: float,
        delays: Mapping[str, float],  # noqa: ARG002
    ) -> tuple[ReplicaPlan, ...]:
        """Return other shares, and other borders with other shares, that may be faster.

        Args:
            plan: The current replicas.
            factors: Factor of each rank, rank 0 first.
            min_gain: Gain below which nothing is to be found.
            delays: How many times as long as predicted the steps of each way take.
        """
        search = self._search(factors)
        if search.step_s(plan) <= (1 + min_gain) * search.problem.bound_s:
            return ()
        return search.plans(plan, layers_move=self.layers_move)

    def allows(self, plan: ReplicaPlan, current: ReplicaPlan) -> bool:
        """Return whether a plan that was current before fits into memory, and needs no layer to move if none can."""
        return (self.layers_move or plan.is_redivision_of(current)) and all(
            memory is None or memory.allows(replica.stages)
            for replica, n in zip(plan.replicas, plan.samples(self.samples), strict=True)
            for memory in [self.measured.memory_of(replica.ranks, max(n, 1))]
        )

    def _search(self, factors: Sequence[float]) -> PlanSearch:
        key = tuple(factors)
        if key not in self._searches:
            if len(self._searches) == _KNOWN:
                self._searches.clear()
            self._searches[key] = PlanSearch(on_devices(self.measured, key))
        return self._searches[key]


def on_devices(problem: ReplicaProblem, factors: Sequence[float]) -> ReplicaProblem:
    """Return a problem for devices that take ``factors`` times as long, shape ``(world_size,)``."""
    overheads = None if problem.overheads is None else problem.overheads.times(factors)
    return replace(problem, costs=problem.costs.times(factors), overheads=overheads)
