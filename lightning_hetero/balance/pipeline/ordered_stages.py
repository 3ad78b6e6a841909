"""Predict and plan again stages whose passes have an order of their own, while devices change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_hetero.balance.pipeline.orders.order import Order, known_order
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, plan_order
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.simulation import PassTimes, order_step_s
from lightning_hetero.balance.pipeline.stage_rebalancer import StageProblem
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["OrderedStageProblem"]

_EFFORT = 20_000  # the ranks wait for it
_BETTER = 1.02  # times the part of the limit that the first stages reach: no others are hoped to reach more
_ONE_BY_ONE = "1f1b"


@dataclass(frozen=True)
class OrderedStageProblem(StageProblem):
    """What is known about layers that run in a planned order.

    Attributes:
        searched: What the search for the first stages was about.
        orders: Orders of stages that were found, for each way the first ones first; others are added. The order "1f1b"
            is a way of its own, to which stages change only if there were such stages at the beginning.
        way: Name of the way in which all others run.
    """

    searched: OrderProblem
    orders: dict[StagePlan, Order]
    way: str = "planned"

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

    @property
    def has_ways(self) -> bool:
        """True: stages may run in a planned order, or as "1f1b"."""
        return True

    def way_of(self, plan: StagePlan) -> str:
        """Return "1f1b" or the name of the other way."""
        order = self.orders.get(plan)
        is_known = order is not None and len({*order.ranks}) == order.num_stages
        return _ONE_BY_ONE if is_known and order == self._one_by_one(plan) else self.way

    def use(self, plan: StagePlan, order: Order | None) -> None:
        """Note the order that a plan is to have."""
        if order is not None:
            self.orders[plan] = order

    def allows(self, plan: StagePlan, current: StagePlan) -> bool:  # noqa: ARG002
        """Return True: stages were found within memory."""
        return plan in self.orders

    def candidates(
        self, plan: StagePlan, factors: Sequence[float], min_gain: float, delays: Mapping[str, float]
    ) -> tuple[StagePlan, ...]:
        """Return stages that may be faster, which are looked for in each way in which there may be something to gain.

        Stages in a planned order keep the ranks that the first ones have.
        """
        searched = replace(self.searched, costs=self.searched.costs.times(factors))
        enough_s = delays.get(self.way_of(plan), 1.0) * self.step_s(plan, factors) / (1 + min_gain)
        looked_for = False
        for way, first in self._first_of_ways().items():
            reached = self.searched.limit_s / self.step_s(first, (1.0,) * first.world_size)
            if enough_s > delays.get(way, 1.0) * searched.limit_s / (_BETTER * reached):
                looked_for = True
                self._look_for(way, searched, first.ranks, plan)
        return tuple(self.orders) if looked_for else ()

    def _first_of_ways(self) -> dict[str, StagePlan]:
        return {self.way_of(plan): plan for plan in reversed(self.orders)}

    def _look_for(self, way: str, searched: OrderProblem, ranks: tuple[int, ...], current: StagePlan) -> None:
        """Add the best stages of a way, if they are found; as long as nothing moves, it is as it was."""
        if way == self.way:
            found = plan_order(searched, [ranks], effort=_EFFORT)
            # the current stages keep the order in which they run, and those of another way stay what they are
            if found is not None and found.stages != current:
                known = self.orders.get(found.stages)
                if known is None or self.way_of(found.stages) == way:
                    self.orders[found.stages] = found.order
            return
        others = (searched.transfer_s, searched.memory, searched.last_rank)
        try:
            plan = plan_pipeline(searched.costs, searched.micro_batches, "1f1b", *others)
        except InfeasiblePlanError:
            return
        self.orders.setdefault(plan, self._one_by_one(plan))

    def _one_by_one(self, plan: StagePlan) -> Order:
        return known_order(plan.ranks, self.searched.micro_batches, "1f1b")

    def _times(self, plan: StagePlan, factors: Sequence[float]) -> PassTimes:
        task = replace(self.searched, costs=self.searched.costs.times(factors), memory=None).task(plan)
        assert task is not None, "memory does not matter to it"
        return task.times
