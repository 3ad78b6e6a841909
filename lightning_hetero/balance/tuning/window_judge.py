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

from lightning_hetero.balance.batch.batch_solver import keeps_limits
from lightning_hetero.balance.tuning.rebalancer import Decision, Rebalancer
from lightning_hetero.balance.types import WindowTiming

__all__ = ["WindowJudge"]

# A doubt that was not confirmed is looked into after this many windows again, and then after twice as many, to a limit.
_FIRST_PAUSE_WINDOWS = 4
_LONGEST_PAUSE_WINDOWS = 64


class WindowJudge:
    """Decides with a rebalancer, and with a second one while watching.

    Args:
        asynchronous: Whether a rank's device works asynchronously to its host.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._watching: Rebalancer | None = None
        self._pause_windows = _FIRST_PAUSE_WINDOWS
        self._windows_left = 0

    def judge(self, rebalancer: Rebalancer, windows: Sequence[WindowTiming | None], synchronised: bool) -> Decision:
        """Decide what follows from the latest window of each rank, shape ``(world_size,)``.

        Args:
            rebalancer: Learns from synchronised windows, and decides.
            windows: The latest window of each rank; None for a rank of which no step was measured.
            synchronised: Whether the hosts waited for their devices in that window.
        """
        if not self.asynchronous:
            return rebalancer.update(windows)
        if synchronised or self._watching is None or not keeps_limits(rebalancer.current, rebalancer.limits):
            return self._of_synchronised(rebalancer, windows)
        before = self._watching.current = rebalancer.current
        self._watching.set_limits(rebalancer.limits)
        self._watching.exchange_s = rebalancer.exchange_s
        seen = self._watching.update(windows)
        self._windows_left -= 1
        if seen.plan == before:
            return seen
        self._watching.current = before
        confirms = self._windows_left <= 0
        window = replace(seen.window, skipped_steps=0 if confirms else seen.window.skipped_steps, synchronised=confirms)
        return replace(seen, plan=before, gain=0.0, tuned=True, window=window)

    def _of_synchronised(self, rebalancer: Rebalancer, windows: Sequence[WindowTiming | None]) -> Decision:
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
