"""The batches that a pipeline trains on, which rank 0 loads, and the position in them at which it was saved."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_hetero.balance.batch.blocks import blocks_before
from lightning_hetero.distributed.collectives import length_of
from lightning_hetero.distributed.data.divided_by_user import what_divides
from lightning_hetero.distributed.random_state import random_state, restore_random_state
from lightning_hetero.plugin.common.loop_progress import TrainingProgress, resume_exactly, training_loaders
from lightning_hetero.plugin.pipeline.rank_zero_batches import RankZeroBatches, TrainingBatches
from lightning_hetero.plugin.pipeline.refusals import refuse_divided_data

__all__ = ["PipelineData"]


class PipelineData:
    """The loaders of one Trainer.

    Lightning saves how many batches of an epoch were trained on, but not their order. With one device and a loader that
    shuffles, it resumes an epoch in another order, so that some samples come a second time. Here the checkpoint also
    holds the order, as the state of the random numbers that it was drawn from.

    Args:
        trainer: The Trainer that owns the loaders.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._saved: list[Any] = []

    def process(self, dataloader: object) -> RankZeroBatches:
        """Return the object over which Lightning iterates instead of a loader; every rank must call this.

        Raises:
            UnsupportedFeatureError: The user has divided the data by rank; raised on every rank.
        """
        refuse_divided_data(what_divides(getattr(dataloader, "original", dataloader)))
        if not self._trainer.training:
            return RankZeroBatches(dataloader)
        resume_exactly()  # TrainingBatches warns if it cannot
        return TrainingBatches(dataloader, self._beginning)

    def state(self) -> list[dict[str, Any]]:
        """Return what a checkpoint must hold, one entry per training loader; only rank 0 knows it."""
        return [{"pass": loader.random_state, "now": random_state(loader)} for loader in self._loaders]

    def load(self, state: Any) -> None:
        """Resume from the value that :meth:`state` returned, or from a checkpoint that has no such value."""
        self._saved = list(state) if isinstance(state, list | tuple) else []

    def go_on(self) -> None:
        """Continue with the random numbers of the earlier run; called on rank 0 when the training begins."""
        for loader in self._loaders:
            now = self._saved_of(loader, "now")
            if now is not None:
                restore_random_state(loader, now)

    def _beginning(self, loader: TrainingBatches) -> tuple[int, Any]:
        position = TrainingProgress(self._trainer).resumed_position
        _, mode = training_loaders(self._trainer)
        return blocks_before(position, length_of(loader), mode), self._saved_of(loader, "pass")

    def _saved_of(self, loader: TrainingBatches, name: str) -> Any:
        """Return the value that was saved under ``name`` for a loader, or None."""
        loaders = self._loaders
        saved = self._saved[loaders.index(loader)] if len(self._saved) == len(loaders) else None
        return saved.get(name) if isinstance(saved, dict) else None

    @property
    def _loaders(self) -> list[TrainingBatches]:
        loaders, _ = training_loaders(self._trainer)
        return [loader for loader in loaders if isinstance(loader, TrainingBatches)]
