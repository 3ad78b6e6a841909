"""Learn how much memory each rank needs for a micro-batch of n samples, from the micro-batches that it runs anyway.

The memory that a step keeps for its backward pass grows with every sample.  Parameters, gradients and the state of the
optimiser do not.  The peak is therefore modelled as a line in n.  With one measured size, the line starts at the memory
that is resident between steps; with two or more sizes, it is fitted and raised until no reading lies above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_hetero.balance.types import MemoryReading

__all__ = ["MemoryModel"]

_SIZES_KEPT = 16


class MemoryModel:
    """A model of the peak memory of all ranks.

    Args:
        world_size: Number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        self._peaks: list[dict[int, float]] = [{} for _ in range(world_size)]
        self._latest: list[MemoryReading | None] = [None] * world_size

    def observe(self, readings: Sequence[MemoryReading | None]) -> None:
        """Learn from one reading per rank, shape ``(world_size,)``; None for a rank without a reading."""
        for peaks, (rank, reading) in zip(self._peaks, enumerate(readings), strict=True):
            if reading is None or reading.samples < 1:
                continue
            self._latest[rank] = reading
            peaks[reading.samples] = max(reading.peak_bytes, peaks.pop(reading.samples, 0.0))
            if len(peaks) > _SIZES_KEPT:
                del peaks[next(iter(peaks))]

    def peak_bytes(self, rank: int, samples: int) -> float | None:
        """Return the predicted peak of a micro-batch of ``samples`` samples; None if nothing is known."""
        line = self._peak_line(rank)
        return None if line is None else line[0] + line[1] * samples

    def most_samples(self, rank: int) -> int | None:
        """Return the largest micro-batch whose predicted peak is within the budget, at least 1; None if unknown."""
        line, latest = self._peak_line(rank), self._latest[rank]
        if line is None or latest is None:
            return None
        resident, per_sample = line
        if per_sample <= 0:
            return None
        fits = [n for n, peak in self._peaks[rank].items() if peak <= latest.budget_bytes]
        return max(math.floor((latest.budget_bytes - resident) / per_sample), *fits, 1)

    def _peak_line(self, rank: int) -> tuple[float, float] | None:
        """Return the bytes that a micro-batch needs whatever its size, and the bytes per sample."""
        peaks, latest = self._peaks[rank], self._latest[rank]
        if latest is None:
            return None
        if len(peaks) == 1:
            ((samples, peak),) = peaks.items()
            resident = min(latest.resident_bytes, peak)
            return resident, (peak - resident) / samples
        sizes, values = np.array(list(peaks)), np.array(list(peaks.values()))
        slope = max(float(np.polyfit(sizes, values, 1)[0]), 0.0)
        return float(np.max(values - slope * sizes)), slope
