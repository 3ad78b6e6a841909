"""What the balancing changed, in the numbers that people look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.step_time import trimmed_mean
from lightning_hetero.balance.types import StepTiming

__all__ = ["RankStatus", "rank_status", "speed_up"]


@dataclass(frozen=True)
class RankStatus:
    """How a rank fares under one plan.

    Attributes:
        samples: its mini-batch.
        own_s: its own time for a step.
        waiting_s: from its last gradient until the gradients of all ranks were combined, communication included.
    """

    samples: int
    own_s: float
    waiting_s: float


def rank_status(timings: Sequence[StepTiming], samples: int) -> RankStatus | None:
    """Average the steps of one size robustly; None where none of them was measured."""
    steps = [timing for timing in timings if timing.samples == samples]
    if not steps:
        return None
    return RankStatus(samples, trimmed_mean([t.own_s for t in steps]), trimmed_mean([t.waiting_s for t in steps]))


def speed_up(before: Sequence[RankStatus], after: Sequence[RankStatus]) -> float:
    """Return how many times as many samples a second are processed after as before."""
    return _samples_per_s(after) / _samples_per_s(before)


def _samples_per_s(statuses: Sequence[RankStatus]) -> float:
    # all ranks are done together, so the times of their steps differ by noise only
    return sum(status.samples for status in statuses) / max(s.own_s + s.waiting_s for s in statuses)
