"""What the balancing changed, in the number that people look at."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.types import WindowTiming

__all__ = ["speed_up"]


def speed_up(before: Sequence[WindowTiming], after: Sequence[WindowTiming]) -> float:
    """Return how many times as many samples a second are processed after as before.

    Args:
        before: a window of each rank, shape ``(world_size,)``.
        after: likewise.
    """
    return _samples_per_s(after) / _samples_per_s(before)


def _samples_per_s(windows: Sequence[WindowTiming]) -> float:
    # all ranks are done together, so the times of their steps differ by noise only
    return sum(window.samples for window in windows) / max(w.own_s + w.waiting_s for w in windows)
