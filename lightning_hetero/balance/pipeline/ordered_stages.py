"""Predict and plan again stages whose passes have an order of their own, while devices change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_hetero.balance.pipeline.orders.order import Order
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, plan_order
from lightning_hetero.balance.pipeline.simulation import PassTimes, order_step_s
from lightning_hetero.balance.pipeline.stage_rebalancer import StageProblem
from lightning_hetero.balance.pipeline.stages import StagePlan

__all__ = ["OrderedStageProblem"]

_EFFORT = 20_000  # the ranks wait for it
_BETTER = 1.02  # times the part of the limit that the first stages reach: no others are hoped to reach more


@dataclass(frozen=True)
class OrderedStageProblem(StageProblem):
    """What is known about layers that run in a planned order.

    Attributes:
        searched: What the search for the first stages was about.
        orders: Orders of stages that were found, the first ones first; others are added.
    """

    searched: OrderProblem
    orders: dict[StagePlan, Order]

    def step_s(self, plan: StagePlan, factors: Sequence[float]) -> float:
        """Return the seconds of a step in the order that is known for a plan, on devices that take longer."""
        order = self.orders[plan].first(self.micro_batches)
        return order_step_s(order, self._times(plan, factors), self.transfer_s) + self.searched.sharing_of(plan)

    def _own_s(self, plan: StagePlan) -> tuple[float, ...]:
        times = self._times(plan, (1.0,) * plan.world_size)
        actions = self.orders[plan].first(self.micro_batches).actions
        return tuple(sum(map(times.seconds, own)) for own in actions)

    def order_of(self, plan: StagePlan) -> Order | None:
        """Return the order that is known for a plan."""
        return self.orders.get(plan)

    def use(self, plan: StagePlan, order: Order | None) -> None:
        """Note the order that a plan is to have."""
        if order is not None:
            self.orders[plan] = order

    def allows(self, plan: StagePlan, current: StagePlan) -> bool:  # noqa: ARG002
        """Return True: stages were found within memory."""
        return plan in self.orders

    def candidates(self, plan: StagePlan, factors: Sequence[float], min_gain: float) -> tuple[StagePlan, ...]:
        """Return stages of the same ranks that may be faster, which a search finds if there is something to gain."""
        searched = replace(self.searched, costs=self.searched.costs.times(factors))
        first, *_ = self.orders
        reached = self.searched.limit_s / self.step_s(first, (1.0,) * first.world_size)
        if self.step_s(plan, factors) <= (1 + min_gain) * searched.limit_s / (_BETTER * reached):
            return ()
        found = plan_order(searched, [plan.ranks], effort=_EFFORT)
        if found is not None and found.stages != plan:
            self.orders[found.stages] = found.order
        return tuple(self.orders)

    def _times(self, plan: StagePlan, factors: Sequence[float]) -> PassTimes:
        task = replace(self.searched, costs=self.searched.costs.times(factors), memory=None).task(plan)
        assert task is not None, "memory does not matter to it"
        return task.times
