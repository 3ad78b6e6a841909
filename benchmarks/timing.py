"""Time steps, whatever is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

from lightning.pytorch import Callback

__all__ = ["QUIET", "SKIPPED_STEPS", "STEPS_A_BLOCK", "StepClock", "without_launcher"]

STEPS_A_BLOCK = 8
SKIPPED_STEPS = 2

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
LAUNCHER = {"LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"}


class StepClock(Callback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note when the step ends."""
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the duration of each step but the first."""
        return [b - a for a, b in pairwise(self.ends)]

    def rates(self, samples: int, blocks: int, steps_a_block: int = STEPS_A_BLOCK) -> list[float]:
        """Return the samples/s of each block of steps, computed from its median step."""
        seconds = [0.0, *self.seconds()]
        starts = [block * steps_a_block for block in range(blocks)]
        return [samples / median(seconds[start + SKIPPED_STEPS : start + steps_a_block]) for start in starts]


@contextmanager
def without_launcher() -> Iterator[None]:
    """Hide torchrun's environment, so that Lightning takes this process for the only one."""
    hidden = {k: os.environ.pop(k) for k in list(os.environ) if k.startswith("TORCHELASTIC") or k in LAUNCHER}
    try:
        yield
    finally:
        os.environ.update(hidden)
