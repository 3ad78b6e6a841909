"""Which part of its global batch the step at hand is given.

Loaders say what they hand out when they hand it out; the step follows later, and other batches may have been handed
out meanwhile: to a callback that looks at one, or by another loader.
"""

from __future__ import annotations

from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["EvaluationSlices", "TrainingSlices"]


class TrainingSlices:
    """The slices of training batches, by training step."""

    def __init__(self) -> None:
        self._by_step: dict[int, BatchSlice] = {}

    def note(self, part: BatchSlice) -> None:
        """A batch is handed out; of several for one step the training gets the last."""
        self._by_step[part.step] = part

    def at(self, step: int) -> BatchSlice | None:
        """Return the slice of ``step``, if any was handed out for it, and forget earlier ones."""
        self._by_step = {known: part for known, part in self._by_step.items() if known >= step}
        return self._by_step.get(step)

    def clear(self) -> None:
        """Forget all."""
        self._by_step.clear()


class EvaluationSlices:
    """The slices of evaluation batches that no step has taken yet, by loader."""

    def __init__(self) -> None:
        self._by_loader: dict[int, BatchSlice] = {}

    def note(self, loader: int, part: BatchSlice) -> None:
        """A batch is handed out."""
        self._by_loader[loader] = part

    def take(self) -> BatchSlice | None:
        """Return the slice of the present step, if its loader is divided.

        Raises:
            UnsupportedFeatureError: several loaders have handed out a batch for this step, and one of the batches is
                a stand-in: it cannot be taken back without the others.
        """
        parts = list(self._by_loader.values())
        self._by_loader.clear()
        if len(parts) > 1 and any(part.samples == 0 for part in parts):
            raise UnsupportedFeatureError(
                f"`hetero_ddp` cannot evaluate {len(parts)} loaders at the same time where one of them has fewer"
                f" samples than ranks in its last batch. Evaluate them one after the other or use `drop_last=True`."
            )
        return parts[0] if parts else None

    def clear(self) -> None:
        """Forget all."""
        self._by_loader.clear()
