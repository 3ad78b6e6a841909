"""Print lines without breaking a progress bar."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["has_progress_bar", "say"]


def has_progress_bar(trainer: Trainer) -> bool:
    """Return whether rank zero shows a progress bar."""
    # Other ranks disable theirs, so whether this rank's bar is enabled does not tell.
    return trainer.progress_bar_callback is not None


def say(trainer: Trainer, message: str) -> None:
    """Print a message on rank zero: above the progress bar during training, otherwise through Lightning's logger."""
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.training:
        rank_zero_info(message)
    elif trainer.is_global_zero:
        bar.print(message)
