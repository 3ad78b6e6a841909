"""Which part of its global batch the step at hand is given.

Loaders say what they hand out when they hand it out; the step follows later, and other batches may have been handed
out meanwhile: to a callback that looks at one, or by a training loop that reads ahead.
"""

from __future__ import annotations

from lightning_hetero.balance.types import BatchSlice

__all__ = ["StepSlices"]


class StepSlices:
    """The slices that loaders have handed out, by the step that they are for."""

    def __init__(self) -> None:
        self._by_step: dict[int, dict[int, BatchSlice]] = {}

    def note(self, loader: int, part: BatchSlice) -> None:
        """A loader hands out a batch; of several for one step the step gets the last."""
        self._by_step.setdefault(part.step, {})[loader] = part

    def of(self, step: int) -> list[BatchSlice]:
        """Return the slices of ``step``, one a loader, and forget those of the step before."""
        self._by_step.pop(step - 1, None)
        return list(self._by_step.get(step, {}).values())

    def clear(self) -> None:
        """Forget all."""
        self._by_step.clear()
