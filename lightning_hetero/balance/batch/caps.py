"""Turn what fits into a rank's memory at a time into limits of its share of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.types import BatchLimits

__all__ = ["limits_of_passes"]


def limits_of_passes(limits: BatchLimits, passes: Sequence[int | None], global_batch_size: int) -> BatchLimits:
    """Limit each rank to what fits in one pass; where that does not hold the global batch, to as few passes as do.

    Args:
        limits: what every plan has to respect in any case.
        passes: most samples of a pass of each rank, shape ``(world_size,)``; None for no limit.
        global_batch_size: samples to divide.

    Returns:
        Limits under which the global batch can be divided, if it can under ``limits``.

    Example:
        >>> limits_of_passes(BatchLimits(), [16, None], 64).max_samples
        (16, 64)
        >>> limits_of_passes(BatchLimits(), [16, 8], 64).max_samples
        (48, 24)
    """
    if all(most is None for most in passes):
        return limits
    hard = limits.max_samples or (global_batch_size,) * len(passes)
    for times in range(1, global_batch_size + 1):
        caps = tuple(
            cap if most is None else min(cap, max(most * times, limits.batch_multiple))
            for cap, most in zip(hard, passes, strict=True)
        )
        # in whole multiples, and one rank takes the remainder besides
        whole = sum(cap // limits.batch_multiple * limits.batch_multiple for cap in caps)
        if whole >= global_batch_size or caps == hard:
            break
    return BatchLimits(caps, limits.batch_multiple)
