"""Explain in words why shares change: which ranks became slower or faster."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.types import BatchPlan, StepTime

__all__ = ["change_reason"]

_NOTEWORTHY = 1.1
_MAX_RANKS = 3


def change_reason(gain: float, plan: BatchPlan, before: Sequence[StepTime], after: Sequence[StepTime]) -> str:
    """Return why ``plan`` is replaced.

    Args:
        gain: Predicted gain; 0.25 stands for a quarter more samples/s.
        plan: Plan until now.
        before: Step times when the plan was adopted, shape ``(world_size,)``; empty if they were unknown or not yet
            trusted.
        after: Step times now, shape ``(world_size,)``.

    Example:
        >>> was, now = StepTime(0.0, 0.001), StepTime(0.0, 0.002)
        >>> change_reason(0.25, BatchPlan((64, 32)), [was, now], [now, now])
        'rank 0 takes 2.00 times as long as before; predicted: 1.25x as many samples/s'
    """
    predicted = f"predicted: {1 + gain:.2f}x as many samples/s"
    factors = [b.seconds(n) / a.seconds(n) for a, b, n in zip(before, after, plan.samples, strict=False)]
    changed = [rank for rank, f in enumerate(factors) if max(f, 1 / f) >= _NOTEWORTHY]
    if not changed:
        return predicted
    if len(changed) > _MAX_RANKS:
        slower = sum(factors[rank] > 1 for rank in changed)
        return f"{slower} ranks became slower and {len(changed) - slower} faster; {predicted}"
    changes = ", ".join(f"rank {rank} takes {factors[rank]:.2f} times as long as before" for rank in changed)
    return f"{changes}; {predicted}"
