"""Predict steps of replicas with planned orders on devices that change, and say which shares may be better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf

from lightning_hetero.balance.pipeline.replicas.orders.group_orders import GroupOrder, OrderTimes
from lightning_hetero.balance.pipeline.replicas.orders.ordered_solver import OrderedReplicas
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.solver import ReplicaSolution
from lightning_hetero.balance.pipeline.replicas.watching.problem import on_devices
from lightning_hetero.balance.pipeline.watched_problem import LEAST_OWN_S

__all__ = ["WatchedOrders"]

_KNOWN = 8  # speeds of devices for which what was computed is kept


@dataclass(frozen=True)
class WatchedOrders:
    """What is known about replicas with planned orders before the first step.

    Their stages and orders stay as they are, since another order needs a search. Shares change.

    Attributes:
        measured: The layers, the ranks, the links, and the batch.
        ordered: The replicas and how each of them is run.
    """

    measured: ReplicaProblem
    ordered: OrderedReplicas
    _times: dict[tuple[float, ...], OrderTimes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def samples(self) -> int:
        """Number of samples per step."""
        return self.measured.samples

    @cached_property
    def _groups(self) -> tuple[GroupOrder, ...]:
        found = zip(self.ordered.solution.plan.replicas, self.ordered.orders, self.ordered.names, strict=True)
        return tuple(GroupOrder(replica.ranks, replica.stages, order, name) for replica, order, name in found)

    def step_s(self, plan: ReplicaPlan, factors: Sequence[float]) -> float:
        """Return the seconds of a step on devices that take ``factors`` times as long, shape ``(world_size,)``."""
        found = self._on(factors).solution(self._groups, plan.samples(self.samples))
        return inf if found is None else found.step_s

    def solution(self, plan: ReplicaPlan, factors: Sequence[float]) -> ReplicaSolution:
        """Return what is predicted for a plan on devices that take ``factors`` times as long."""
        found = self._on(factors).solution(self._groups, plan.samples(self.samples))
        assert found is not None, "a plan that does not fit into memory is not taken"
        return replace(found, plan=plan)

    def own_s(self, plan: ReplicaPlan, samples: int | None = None) -> tuple[float, ...]:
        """Return the predicted seconds of the passes of each rank in one step, rank 0 first."""
        own_s = [LEAST_OWN_S] * plan.world_size
        divided = plan.trained_samples(self.samples if samples is None else samples)
        for one, n in zip(self._groups, divided, strict=True):
            for rank, seconds in zip(one.ranks, self._on((1.0,) * plan.world_size).own_s(one, n), strict=True):
                own_s[rank] = max(seconds, LEAST_OWN_S)
        return tuple(own_s)

    def changing_s(self, before: ReplicaPlan, after: ReplicaPlan) -> float:  # noqa: ARG002
        """Return 0: only shares change."""
        return 0.0

    def order_of(self, plan: ReplicaPlan) -> None:
        """Return None: each replica keeps its order."""

    @property
    def has_ways(self) -> bool:
        """False: each replica keeps its way."""
        return False

    def way_of(self, plan: ReplicaPlan) -> str:  # noqa: ARG002
        """Return the names of the ways of all replicas."""
        return ", ".join(self.ordered.names)

    def use(self, plan: ReplicaPlan, order: None) -> None:
        """Note the order that a plan is to have: that which it has."""

    def candidates(
        self,
        plan: ReplicaPlan,
        factors: Sequence[float],
        min_gain: float,
        delays: Mapping[str, float],  # noqa: ARG002
    ) -> tuple[ReplicaPlan, ...]:
        """Return other shares that may be faster.

        Args:
            plan: The current replicas.
            factors: Factor of each rank, rank 0 first.
            min_gain: Gain below which nothing is to be found.
            delays: How many times as long as predicted the steps of each way take.
        """
        times = self._on(factors)
        if self.step_s(plan, factors) <= (1 + min_gain) * on_devices(self.measured, factors).bound_s:
            return ()
        found = times.divided(self._groups, plan.samples(self.samples))
        return () if found is None else tuple(dict.fromkeys((plan, found.plan)))

    def allows(self, plan: ReplicaPlan, current: ReplicaPlan) -> bool:
        """Return whether a plan that was current before fits into memory, and differs in shares alone."""
        times = self._on((1.0,) * plan.world_size)
        return plan.is_redivision_of(current) and all(map(times.fits, self._groups, plan.samples(self.samples)))

    def without_moves(self, plan: ReplicaPlan) -> WatchedOrders | None:
        """Return the problem for layers that cannot move, which it is; None if there is one pipeline."""
        return self if len(plan.replicas) > 1 else None

    def _on(self, factors: Sequence[float]) -> OrderTimes:
        key = tuple(factors)
        if key not in self._times:
            if len(self._times) == _KNOWN:
                self._times.clear()
            self._times[key] = OrderTimes(on_devices(self.measured, key))
        return self._times[key]
