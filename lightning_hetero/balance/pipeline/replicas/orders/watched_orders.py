"""Predict steps of replicas with planned orders on devices that change, and say which plans may be faster.

Other shares alone cost nothing to change to. In another plan, replicas also have other borders, and orders that are
searched again for the ranks of their stages, which stay in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from lightning_hetero.balance.pipeline.orders.choice import problem_of_way
from lightning_hetero.balance.pipeline.orders.order import Order
from lightning_hetero.balance.pipeline.orders.search import plan_order
from lightning_hetero.balance.pipeline.replicas.orders.group_orders import GroupOrder, OrderTimes
from lightning_hetero.balance.pipeline.replicas.orders.ordered_solver import OrderedReplicas
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.solver import ReplicaSolution
from lightning_hetero.balance.pipeline.replicas.watching.problem import KnownReplicas, on_devices
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.balance.pipeline.watched_problem import LEAST_OWN_S

__all__ = ["WatchedOrders"]

_KNOWN = 8  # speeds of devices for which what was computed is kept
_EFFORT = 20_000  # of the searches for all replicas together: the ranks wait for them
_BETTER = 1.02  # times the part of the limit that the first plan reaches: no other is hoped to reach more

_Orders = tuple[Order | None, ...]
_Stages = tuple[StagePlan, ...]


@dataclass(frozen=True)
class WatchedOrders(KnownReplicas):
    """What is known about replicas with planned orders before the first step.

    Attributes:
        ordered: The first replicas and how each of them is run.
    """

    ordered: OrderedReplicas
    _times: dict[tuple[float, ...], OrderTimes] = field(default_factory=dict, repr=False, compare=False)
    _found: dict[_Stages, tuple[GroupOrder, ...]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.use(self.ordered.solution.plan, self.ordered.orders)

    def step_s(self, plan: ReplicaPlan, factors: Sequence[float]) -> float:
        """Return the seconds of a step on devices that take ``factors`` times as long, shape ``(world_size,)``."""
        found = self._on(factors).solution(self._groups(plan), plan.samples(self.samples))
        return inf if found is None else found.step_s

    def solution(self, plan: ReplicaPlan, factors: Sequence[float]) -> ReplicaSolution:
        """Return what is predicted for a plan on devices that take ``factors`` times as long."""
        found = self._on(factors).solution(self._groups(plan), plan.samples(self.samples))
        assert found is not None, "a plan that does not fit into memory is not taken"
        return replace(found, plan=plan)

    def own_s(self, plan: ReplicaPlan, samples: int | None = None) -> tuple[float, ...]:
        """Return the predicted seconds of the passes of each rank in one step, rank 0 first."""
        own_s, times = [LEAST_OWN_S] * plan.world_size, self._on((1.0,) * plan.world_size)
        divided = plan.trained_samples(self.samples if samples is None else samples)
        for one, n in zip(self._groups(plan), divided, strict=True):
            for rank, seconds in zip(one.ranks, times.own_s(one, n), strict=True):
                own_s[rank] = max(seconds, LEAST_OWN_S)
        return tuple(own_s)

    def order_of(self, plan: ReplicaPlan) -> _Orders:
        """Return the order of each replica; None for "1f1b"."""
        return tuple(one.order for one in self._groups(plan))

    def way_of(self, plan: ReplicaPlan) -> str:  # noqa: ARG002
        """Return the names of the ways of all replicas."""
        return ", ".join(self.ordered.names)

    def use(self, plan: ReplicaPlan, order: _Orders | None) -> None:
        """Note the orders that a plan is to have."""
        if order is not None and _stages_of(plan) not in self._found:
            rows = zip(plan.replicas, order, self.ordered.names, strict=True)
            groups = (GroupOrder(one.ranks, one.stages, passes, name) for one, passes, name in rows)
            self._found[_stages_of(plan)] = tuple(groups)

    def candidates(
        self,
        plan: ReplicaPlan,
        factors: Sequence[float],
        min_gain: float,
        delays: Mapping[str, float],  # noqa: ARG002
    ) -> tuple[ReplicaPlan, ...]:
        """Return other shares, and other borders and orders with other shares, that may be faster.

        Args:
            plan: The current replicas.
            factors: Factor of each rank, rank 0 first.
            min_gain: Gain below which nothing is to be found.
            delays: How many times as long as predicted the steps of each way take.
        """
        first, now_s = self.ordered.solution.plan, self.step_s(plan, factors)
        reached = self.measured.bound_s / self.step_s(first, (1.0,) * plan.world_size)
        if now_s <= (1 + min_gain) * on_devices(self.measured, factors).bound_s / (_BETTER * reached):
            return ()
        times, groups, samples = self._on(factors), self._groups(plan), plan.samples(self.samples)
        found = [plan]
        divided = times.divided(groups, samples)
        if divided is not None:
            found.append(divided.plan)
        if self.layers_move:
            divisions = dict.fromkeys((samples, samples if divided is None else divided.samples))
            for division in divisions:
                others = tuple(self._searched(times, *pair) for pair in zip(groups, division, strict=True))
                solution = times.divided(others, division)
                if solution is not None:
                    self._found.setdefault(_stages_of(solution.plan), others)
                    found.append(solution.plan)
        return tuple(dict.fromkeys(found))

    def _searched(self, times: OrderTimes, one: GroupOrder, samples: int) -> GroupOrder:
        """Return a group with the borders and the order that are best on devices of some speed, or as it is."""
        if one.order is None or not samples:
            return one
        effort = _EFFORT // (2 * len(self.ordered.names))
        searched = problem_of_way(times.searched(one.ranks, samples), one.name)
        found = plan_order(searched, [one.stages.ranks], effort=effort)
        other = one if found is None else replace(one, stages=found.stages, order=found.order)
        return min(one, other, key=lambda group: times.step_s(group, samples))

    def allows(self, plan: ReplicaPlan, current: ReplicaPlan) -> bool:
        """Return whether a plan that was current before fits into memory, and needs no layer to move if none can."""
        fits = self._on((1.0,) * plan.world_size).fits
        return (
            (self.layers_move or plan.is_redivision_of(current))
            and _stages_of(plan) in self._found
            and all(map(fits, self._groups(plan), plan.samples(self.samples)))
        )

    def _groups(self, plan: ReplicaPlan) -> tuple[GroupOrder, ...]:
        return self._found[_stages_of(plan)]

    def _on(self, factors: Sequence[float]) -> OrderTimes:
        key = tuple(factors)
        if key not in self._times:
            if len(self._times) == _KNOWN:
                self._times.clear()
            self._times[key] = OrderTimes(on_devices(self.measured, key))
        return self._times[key]


def _stages_of(plan: ReplicaPlan) -> _Stages:
    return tuple(replica.stages for replica in plan.replicas)
