"""Say something in the terminal without tearing a progress bar apart."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["has_progress_bar", "say"]


def has_progress_bar(trainer: Trainer) -> bool:
    """Whether the user sees, or would on rank zero see, a progress bar."""
    # ranks other than zero disable theirs, so the Trainer's bar alone does not tell
    return trainer.progress_bar_callback is not None


def say(trainer: Trainer, message: str) -> None:
    """Print a message on rank zero: above the progress bar of a running training, else through Lightning's logger."""
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.training:
        rank_zero_info(message)
    elif trainer.is_global_zero:
        bar.print(message)
