"""Judge windows of devices that work asynchronously to their hosts.

Own times of such ranks can be compared only if the hosts wait for their devices before each measured step, because
otherwise it depends on a rank's waiting how much of its host's time they hold. That costs time in small steps, so only
the windows of the tuning are measured so. While watching, windows are measured without waiting. They show that
something has changed, but not by how much, so nothing moves before a synchronised window has confirmed it. Only a plan
that breaks the limits, for example because memory has run short, is left at once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lightning_hetero.balance.tuning.rebalancer import Window
from lightning_hetero.balance.types import WindowTiming

__all__ = ["DecidesOnPlans", "PlanDecision", "WindowJudge"]

# A doubt that was not confirmed is looked into after this many windows again, and then after twice as many, to a limit.
_FIRST_PAUSE_WINDOWS = 4
_LONGEST_PAUSE_WINDOWS = 64


class PlanDecision(Protocol):
    """What is decided after a window; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def plan(self) -> Any:
        """The plan to follow from now on."""

    @property
    def gain(self) -> float:
        """Gain of ``plan`` over the plan before it."""

    @property
    def tuned(self) -> bool:
        """Whether the tuning is over."""

    @property
    def window(self) -> Window:
        """The steps to measure next."""


_Decision = TypeVar("_Decision", bound=PlanDecision)
_Decision_co = TypeVar("_Decision_co", bound=PlanDecision, covariant=True)


class DecidesOnPlans(Protocol[_Decision_co]):
    """Learns from windows, and decides which plan to follow.

    Attributes:
        current: The plan that holds now.
    """

    current: Any

    @property
    def must_change(self) -> bool:
        """Whether the current plan is left at once."""
        ...

    def follow(self, other: Any) -> None:
        """Take over everything but measurements from another object of this class."""
        ...

    def update(self, windows: Sequence[WindowTiming | None]) -> _Decision_co:
        """Learn from the latest window of each rank, and decide."""
        ...


class WindowJudge(Generic[_Decision]):
    """Decides with a rebalancer, and with a second one while watching.

    Args:
        asynchronous: Whether a rank's device works asynchronously to its host.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._watching: DecidesOnPlans[_Decision] | None = None
        self._pause_windows = _FIRST_PAUSE_WINDOWS
        self._windows_left = 0

    def judge(
        self, rebalancer: DecidesOnPlans[_Decision], windows: Sequence[WindowTiming | None], synchronised: bool
    ) -> _Decision:
        """Decide what follows from the latest window of each rank, shape ``(world_size,)``.

        Args:
            rebalancer: Learns from synchronised windows, and decides.
            windows: The latest window of each rank; None for a rank of which no step was measured.
            synchronised: Whether the hosts waited for their devices in that window.
        """
        if not self.asynchronous:
            return rebalancer.update(windows)
        if synchronised or self._watching is None or rebalancer.must_change:
            return self._of_synchronised(rebalancer, windows)
        before = rebalancer.current
        self._watching.follow(rebalancer)
        seen = self._watching.update(windows)
        self._windows_left -= 1
        if seen.plan == before:
            return seen
        self._watching.current = before
        confirms = self._windows_left <= 0
        window = replace(seen.window, skipped_steps=0 if confirms else seen.window.skipped_steps, synchronised=confirms)
        return replace(seen, plan=before, gain=0.0, tuned=True, window=window)

    def _of_synchronised(
        self, rebalancer: DecidesOnPlans[_Decision], windows: Sequence[WindowTiming | None]
    ) -> _Decision:
        confirming, before = self._watching is not None, rebalancer.current
        decision = rebalancer.update(windows)
        if not decision.tuned:
            self._watching = None
            return replace(decision, window=replace(decision.window, synchronised=True))
        if confirming and decision.plan == before:
            self._windows_left, self._pause_windows = (
                self._pause_windows,
                min(2 * self._pause_windows, _LONGEST_PAUSE_WINDOWS),
            )
        else:
            self._windows_left, self._pause_windows = 0, _FIRST_PAUSE_WINDOWS
        self._watching = copy.deepcopy(rebalancer)
        # after a change it must be seen whether it was right
        return replace(decision, window=replace(decision.window, synchronised=decision.plan != before))
