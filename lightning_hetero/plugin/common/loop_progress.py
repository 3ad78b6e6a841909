"""Where Lightning's loops stand; every attribute of them that is not documented is read here."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Trainer

from lightning_hetero.plugin.common.lightning_private import combined_loaders, evaluation_loop, logged_step

__all__ = ["TrainingProgress", "evaluation_loaders", "resume_exactly", "training_loaders"]


class TrainingProgress:
    """The counters of a Trainer's training loop.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loop: Any = trainer.fit_loop

    @property
    def epoch(self) -> int:
        """What Lightning sets samplers to; ``current_epoch`` lags behind it where a run is resumed."""
        return self._loop.epoch_progress.current.processed  # type: ignore[no-any-return]

    @property
    def step(self) -> int:
        """The step at hand, or the last one; counted from 0 over all epochs; -1 before the first."""
        return self._loop.total_batch_idx  # type: ignore[no-any-return]

    @property
    def logged_step(self) -> int:
        """The step under which Lightning's loggers file what is logged now."""
        return logged_step(self._loop)

    @property
    def position(self) -> int:
        """How many steps of the present epoch have begun; right from the first fetch of an epoch on."""
        return self._loop.epoch_loop.batch_progress.current.ready  # type: ignore[no-any-return]

    @property
    def resumed_position(self) -> int:
        """How many steps of the present epoch an earlier run has made; 0 unless a run is resumed in mid-epoch.

        To be asked where the first batch of an epoch is read ahead, before its loop has reset ``position``.
        """
        batches = self._loop.epoch_loop.batch_progress
        made = batches.current.processed  # a checkpoint of an exception is saved within a step, which is made again
        ended = batches.is_last_batch and made == batches.current.ready
        return made if self._loop.restarting and not ended else 0

    def undo_unfinished_step(self) -> None:
        """Count a step as not begun in which an exception has ended an earlier run; to be called before a fetch.

        Lightning (2.6.6) makes such a step again, but it does not count it out of the total of all epochs: later steps
        then have numbers that are one too high, and a run that resumes from one of their checkpoints repeats samples.
        """
        total = self._loop.epoch_loop.batch_progress.total
        total.ready, total.started = min(total.ready, total.processed), min(total.started, total.processed)

    def begin_epoch(self) -> None:
        """Count the epoch at hand as begun, where Lightning has not.

        It does not in the epoch behind a checkpoint that was saved in an epoch's last step (Lightning 2.6.6), and then
        a checkpoint of that epoch is taken for one of its end: a run that resumes from it repeats samples.
        """
        for counts in (self._loop.epoch_progress.total, self._loop.epoch_progress.current):
            counts.ready = max(counts.ready, counts.processed + 1)
            counts.started = max(counts.started, counts.processed + 1)


def resume_exactly() -> None:
    """Say nothing of loaders that cannot be resumed: Lightning warns of all that save nothing themselves."""
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")


def training_loaders(trainer: Trainer) -> tuple[list[Any], str]:
    """Return the training loaders, and how they are combined: the ``mode`` of ``CombinedLoader``."""
    return combined_loaders(trainer.fit_loop)


def evaluation_loaders(trainer: Trainer) -> tuple[list[Any], str]:
    """Return the loaders of the evaluation at hand, and how they are combined."""
    return combined_loaders(evaluation_loop(trainer))
