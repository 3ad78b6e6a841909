"""The progress of Lightning's loops. All their undocumented attributes are read here."""

from __future__ import annotations

import math
import warnings
from typing import Any

from lightning.pytorch import Trainer

from lightning_hetero.plugin.common.lightning_private import combined_loaders, evaluation_loop, logged_step

__all__ = ["TrainingProgress", "evaluation_loaders", "resume_exactly", "training_loaders"]


class TrainingProgress:
    """The counters of a Trainer's training loop.

    Args:
        trainer: The Trainer whose training loop is read.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loop: Any = trainer.fit_loop

    @property
    def epoch(self) -> int:
        """The epoch to which Lightning sets samplers; ``current_epoch`` lags behind it if a run is resumed."""
        return self._loop.epoch_progress.current.processed  # type: ignore[no-any-return]

    @property
    def step(self) -> int:
        """The current or latest step, counted from 0 over all epochs; -1 before the first."""
        return self._loop.total_batch_idx  # type: ignore[no-any-return]

    @property
    def remaining_steps(self) -> float:
        """The number of steps from the current one on, if nothing ends the training before; infinite if unknown."""
        loop = self._loop
        left = [math.inf]
        if loop.max_steps is not None and loop.max_steps >= 0:
            left.append((loop.max_steps - loop.trainer.global_step) * loop.trainer.accumulate_grad_batches)
        if loop.max_epochs is not None and loop.max_epochs >= 0:
            left.append((loop.max_epochs - self.epoch) * loop.trainer.num_training_batches - loop.batch_idx)
        return max(min(left), 0)

    @property
    def logged_step(self) -> int:
        """The step number that Lightning's loggers give to values logged now."""
        return logged_step(self._loop)

    @property
    def position(self) -> int:
        """Number of steps of the current epoch that have begun; correct from the first fetch of an epoch on."""
        return self._loop.epoch_loop.batch_progress.current.ready  # type: ignore[no-any-return]

    @property
    def resumed_position(self) -> int:
        """Number of steps of the current epoch that an earlier run has made; 0 unless a run is resumed in mid-epoch.

        Read it when the first batch of an epoch is read ahead, before the loop has reset ``position``.
        """
        batches = self._loop.epoch_loop.batch_progress
        made = batches.current.processed  # an exception's checkpoint is saved within a step, which is repeated
        ended = batches.is_last_batch and made == batches.current.ready
        return made if self._loop.restarting and not ended else 0

    def undo_unfinished_step(self) -> None:
        """Count a step in which an exception has ended an earlier run as not begun; call this before a fetch.

        Lightning (2.6.6) repeats such a step, but does not subtract it from the total of all epochs. The numbers of
        later steps are then one too high, and a run that resumes from one of their checkpoints repeats samples.
        """
        total = self._loop.epoch_loop.batch_progress.total
        total.ready, total.started = min(total.ready, total.processed), min(total.started, total.processed)

    def begin_epoch(self) -> None:
        """Count the current epoch as begun if Lightning has not.

        Lightning (2.6.6) does not if the run resumes from a checkpoint of the previous epoch's last step. It then takes
        a checkpoint within the current epoch for one of its end, and a run that resumes from it repeats samples.
        """
        for counts in (self._loop.epoch_progress.total, self._loop.epoch_progress.current):
            counts.ready = max(counts.ready, counts.processed + 1)
            counts.started = max(counts.started, counts.processed + 1)


def resume_exactly() -> None:
    """Silence the warning that loaders cannot be resumed: Lightning warns of all that save no state themselves."""
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")


def training_loaders(trainer: Trainer) -> tuple[list[Any], str]:
    """Return the training loaders, and the ``mode`` in which ``CombinedLoader`` combines them."""
    return combined_loaders(trainer.fit_loop)


def evaluation_loaders(trainer: Trainer) -> tuple[list[Any], str]:
    """Return the loaders of the current evaluation, and the ``mode`` in which they are combined."""
    return combined_loaders(evaluation_loop(trainer))
