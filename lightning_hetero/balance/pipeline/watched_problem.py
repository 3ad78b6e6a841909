"""What the watching of a training has to know about its layers: of one pipeline, or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from typing_extensions import Self

__all__ = ["LEAST_OWN_S", "PlanT", "WatchedPlan", "WatchedProblem"]

# Every rank takes at least so many seconds, so that its time can be compared with another one.
LEAST_OWN_S = 1e-9


class WatchedPlan(Protocol):
    """Which rank has which layers, and which samples if there are replicas; plans that are the same are equal."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""


PlanT = TypeVar("PlanT", bound=WatchedPlan)


class WatchedProblem(Protocol[PlanT]):
    """Predicts steps, and finds plans that may be faster, from times that were measured before the first step."""

    @property
    def samples(self) -> int:
        """Number of samples per step."""

    def step_s(self, plan: PlanT, factors: Sequence[float]) -> float:
        """Return the seconds of a step on devices that take ``factors`` times as long, shape ``(world_size,)``."""

    def own_s(self, plan: PlanT, samples: int | None = None) -> tuple[float, ...]:
        """Return the predicted seconds of the passes of each rank in one step, rank 0 first.

        Args:
            plan: The plan.
            samples: Number of samples in the step; None for the usual number.
        """

    def changing_s(self, before: PlanT, after: PlanT) -> float:
        """Return the seconds that it takes to change from one plan to another; 0 if no layer moves."""

    def order_of(self, plan: PlanT) -> Any:
        """Return the order of passes that is known for a plan; None if it is that of the pipeline schedule."""

    @property
    def has_ways(self) -> bool:
        """Whether plans may run in more than one way."""

    def way_of(self, plan: PlanT) -> str:
        """Return the name of the way in which a plan runs; steps of one way are delayed alike."""

    def use(self, plan: PlanT, order: Any) -> None:
        """Note the order of passes that a plan is to have."""

    def candidates(
        self, plan: PlanT, factors: Sequence[float], min_gain: float, delays: Mapping[str, float]
    ) -> tuple[PlanT, ...]:
        """Return plans that may be faster on devices that take ``factors`` times as long.

        Args:
            plan: The current plan.
            factors: Factor of each rank, rank 0 first.
            min_gain: Gain below which nothing is to be found.
            delays: How many times as long as predicted the steps of each way take; of other ways, 1.
        """

    def allows(self, plan: PlanT, current: PlanT) -> bool:
        """Return whether the current plan may be left for one that has held before."""

    def without_moves(self, plan: PlanT) -> Self | None:
        """Return the problem for layers that cannot move; None if nothing else can change."""
