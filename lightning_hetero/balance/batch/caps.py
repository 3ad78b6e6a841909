"""Turn what fits into a rank's memory at a time into limits of its share of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.types import BatchLimits

__all__ = ["halved", "limits_of_micro_batches", "micro_batch_sizes"]


def limits_of_micro_batches(limits: BatchLimits, passes: Sequence[int | None], global_batch_size: int) -> BatchLimits:
    """Limit each rank to what fits in one pass; where that does not hold the global batch, to as few passes as do.

    Args:
        limits: what every plan has to respect in any case.
        passes: most samples of a pass of each rank, shape ``(world_size,)``; None for no limit.
        global_batch_size: samples to divide.

    Returns:
        Limits under which the global batch can be divided, if it can under ``limits``.

    Example:
        >>> limits_of_micro_batches(BatchLimits(), [16, None], 64).max_samples
        (16, 64)
        >>> limits_of_micro_batches(BatchLimits(), [16, 8], 64).max_samples
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


def micro_batch_sizes(samples: int, most: int | None) -> tuple[int, ...]:
    """Return the sizes of as few passes as possible, as equal as possible, the larger ones first.

    Args:
        samples: what is divided.
        most: most samples of a pass, at least 1; None for no limit.

    Example:
        >>> micro_batch_sizes(10, 4), micro_batch_sizes(10, None), micro_batch_sizes(0, 4)
        ((4, 3, 3), (10,), ())
    """
    if samples == 0:
        return ()
    passes = 1 if most is None else -(-samples // most)
    size, larger = divmod(samples, passes)
    return (size + 1,) * larger + (size,) * (passes - larger)


def halved(size: int) -> int:
    """Return the next smaller limit behind a pass of ``size`` samples, at least 2, that did not fit."""
    return -(-size // 2)
