"""Read what a window has used of a rank's memory."""

from __future__ import annotations

from lightning_hetero.balance.batch.caps import micro_batch_sizes
from lightning_hetero.balance.types import MemoryReading
from lightning_hetero.plugin.common.protocols import BalancedStrategy

__all__ = ["read_memory"]

_NOTHING_READ = MemoryReading(0, 0.0, 0.0, 0.0)


def read_memory(strategy: BalancedStrategy, samples: int, memory_fraction: float) -> MemoryReading:
    """Return the peak since the last call and the rank's budget, and begin to measure the next peak.

    Args:
        strategy: The strategy whose memory is read.
        samples: Size of the rank's mini-batch in the window.
        memory_fraction: Fraction of the device's memory that a plan may use.
    """
    memory = strategy.memory
    if memory is None or not strategy.counts_samples or (use := memory.read()) is None:
        return _NOTHING_READ
    memory.restart()  # the next window may follow at once
    largest = max(micro_batch_sizes(samples, strategy.micro_batch_limits.most), default=0)
    return MemoryReading(largest, use.resident_bytes, use.peak_bytes, memory_fraction * use.available_bytes)
