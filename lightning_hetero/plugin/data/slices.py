"""Find the part of the global batch that belongs to a step.

A loader notes the part when it hands out a batch. The step follows later, and other batches may have been handed out in
the meantime: to a callback that looks at one, or to a training loop that reads ahead.
"""

from __future__ import annotations

from lightning_hetero.balance.types import BatchSlice

__all__ = ["StepSlices"]


class StepSlices:
    """The slices that loaders have handed out, by step."""

    def __init__(self) -> None:
        self._by_step: dict[int, dict[int, BatchSlice]] = {}

    def note(self, loader: int, part: BatchSlice) -> None:
        """Note that a loader hands out a batch; of several for one step, the last one counts.

        Args:
            loader: Number that identifies the loader.
            part: This rank's part of the global batch.
        """
        self._by_step.setdefault(part.step, {})[loader] = part

    def of(self, step: int) -> list[BatchSlice]:
        """Return the slices of ``step``, one per loader, and forget those of the step before."""
        self._by_step.pop(step - 1, None)
        return list(self._by_step.get(step, {}).values())

    def clear(self) -> None:
        """Forget all slices."""
        self._by_step.clear()
