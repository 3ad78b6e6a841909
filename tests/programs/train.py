"""A user's script: ``train.py STRATEGY [RANK]``; that rank runs out of memory whatever the size of its batch."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, flat

from lightning_hetero import HeteroDDPStrategy

__all__ = ["HeteroDDPStrategy"]  # for the strategy's expression


class NeverFits(SmallModule):
    """Runs out of memory in the backward pass of the fourth step, with a single sample too."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.rank == self.global_rank and self.trainer.fit_loop.total_batch_idx == 3:
            loss.register_hook(self.run_out)
        return loss

    def run_out(self, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory, raised by a test")


def main(strategy: Any, rank: int) -> None:
    warnings.filterwarnings("ignore")
    seed_everything(7, verbose=False)
    module = NeverFits(rank)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=12, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Numbered(46), batch_size=4, shuffle=True))
    if trainer.is_global_zero:
        sys.stdout.write(f"parameters {flat(module.network)}\n")


if __name__ == "__main__":
    main(eval(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else -1)
