"""Let a device of two pipelines side by side become slower in the middle of a training, and see what that costs.

    torchrun --nproc-per-node 4 benchmarks/replica_drift.py

Compared are replicas that are watched, those that are not, and those of a training in which the device is slow from the
start.
"""

from __future__ import annotations

import logging
import warnings
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from replicas import FEATURES, MICRO_BATCHES, Stack, described
from timing import QUIET, StepClock
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.testing import SlowLayers

STEPS, SLOW_FROM, LAST = 110, 40, 25
SAMPLES, SECONDS_PER_SAMPLE, SLOWER = 48, 0.001, 2.0
GROUPS = [[0, 2], [1, 3]]
SLOW_RANKS = {"one rank": [3], "both ranks of a replica": [1, 3]}


class Slower(Callback):
    """Makes some ranks slower from a step on."""

    def __init__(self, slow: SlowLayers, ranks: list[int], from_step: int) -> None:
        self.slow, self.ranks, self.from_step = slow, ranks, from_step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Change the factors when the step has come."""
        if trainer.fit_loop.total_batch_idx == self.from_step:
            self.slow.factors = [SLOWER if rank in self.ranks else 1.0 for rank in range(4)]


def train(ranks: list[int], *, watched: bool, from_step: int) -> tuple[HeteroPipelineStrategy, list[float]]:
    """Train, and return the seconds of each step but the first."""
    clock = StepClock()
    slow = SlowLayers([SLOWER if rank in ranks and not from_step else 1.0 for rank in range(4)], SECONDS_PER_SAMPLE)
    strategy = HeteroPipelineStrategy(
        replicas=GROUPS,
        num_microbatches=MICRO_BATCHES,
        schedule="1f1b",
        watch_steps=10 if watched else 0,
        verbose=watched,
    )
    trainer = Trainer(
        accelerator="cpu", devices=4, strategy=strategy, max_steps=STEPS, max_epochs=-1,
        callbacks=[slow, Slower(slow, ranks, from_step), clock], **QUIET,
    )  # fmt: skip
    trainer.fit(Stack(), DataLoader(TensorDataset(torch.randn(SAMPLES * STEPS, FEATURES)), SAMPLES))
    return strategy, clock.seconds()


def main() -> None:
    """Print a line for each training."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, ranks in SLOW_RANKS.items():
        for way, watched, from_step in (
            ("watched", True, SLOW_FROM),
            ("not watched", False, SLOW_FROM),
            ("slow from the start", False, 0),
        ):
            strategy, seconds = train(ranks, watched=watched, from_step=from_step)
            before, after = (1e3 * median(part) for part in (seconds[5:SLOW_FROM], seconds[-LAST:]))
            dist.barrier()
            if dist.get_rank() == 0:
                at = [change.step for change in strategy.changes]
                line = f"{name} slow, {way}: {before:.0f} ms per step before step {SLOW_FROM}, {after:.0f} ms in the"
                print(f"{line} last {LAST}; changed at {at}; {described(strategy)}", flush=True)


if __name__ == "__main__":
    main()
