"""Turn the largest micro-batch that fits into a rank's memory into limits of its mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_hetero.balance.types import BatchLimits

__all__ = ["MicroBatchLimits", "halved", "limits_of_micro_batches", "micro_batch_sizes"]


@dataclass
class MicroBatchLimits:
    """How large the micro-batches of one rank may be, in samples; None for no limit.

    Attributes:
        limit: The largest micro-batch allowed by the user, or since memory ran out.
        predicted: The largest micro-batch that is expected to fit.
        times_out_of_memory: How often memory ran out.
        why_one: Reason why a step of this training must be one micro-batch; None if it may be several.
    """

    limit: int | None = None
    predicted: int | None = None
    times_out_of_memory: int = 0
    why_one: str | None = None

    @property
    def most(self) -> int | None:
        """The largest micro-batch allowed, for whatever reason."""
        if self.why_one is not None:
            return None
        return min((n for n in (self.limit, self.predicted) if n is not None), default=None)


def limits_of_micro_batches(
    limits: BatchLimits, micro_batches: Sequence[int | None], global_batch_size: int
) -> BatchLimits:
    """Limit each rank to one micro-batch, or to as few micro-batches as the global batch needs.

    Args:
        limits: Limits that every plan must respect in any case.
        micro_batches: Maximum micro-batch size of each rank in samples, shape ``(world_size,)``; None for no limit.
        global_batch_size: Number of samples to divide.

    Returns:
        Limits under which the global batch can be divided, if it can be under ``limits``.

    Example:
        >>> limits_of_micro_batches(BatchLimits(), [16, None], 64).max_samples
        (16, 64)
        >>> limits_of_micro_batches(BatchLimits(), [16, 8], 64).max_samples
        (48, 24)
    """
    if all(most is None for most in micro_batches):
        return limits
    hard = limits.max_samples or (global_batch_size,) * len(micro_batches)
    for count in range(1, global_batch_size + 1):
        caps = tuple(
            cap if most is None else min(cap, max(most * count, limits.batch_multiple, limits.min_samples))
            for cap, most in zip(hard, micro_batches, strict=True)
        )
        # in whole multiples; one rank takes the remainder in addition
        whole = sum(cap // limits.batch_multiple * limits.batch_multiple for cap in caps)
        if whole >= global_batch_size or caps == hard:
            break
    return replace(limits, max_samples=caps)


def micro_batch_sizes(samples: int, most: int | None) -> tuple[int, ...]:
    """Divide samples into as few micro-batches as possible, as equal as possible, the larger ones first.

    Args:
        samples: Number of samples to divide.
        most: Maximum number of samples in a micro-batch, at least 1; None for no limit.

    Returns:
        The size of each micro-batch.

    Example:
        >>> micro_batch_sizes(10, 4), micro_batch_sizes(10, None), micro_batch_sizes(0, 4)
        ((4, 3, 3), (10,), ())
    """
    if samples == 0:
        return ()
    count = 1 if most is None else -(-samples // most)
    size, larger = divmod(samples, count)
    return (size + 1,) * larger + (size,) * (count - larger)


def halved(size: int) -> int:
    """Return the limit to try after a micro-batch of ``size`` samples, at least 2, did not fit."""
    return -(-size // 2)
