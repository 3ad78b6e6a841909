"""A user's script with shards on two ranks: ``shards.py START_METHOD PHASE RANK``; that rank fails in that phase."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroFSDPStrategy

START_METHOD, PHASE, RANK = sys.argv[1], sys.argv[2], int(sys.argv[3])


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def reaches(self, phase: str) -> None:
        if PHASE in (phase, f"dies in {phase}") and self.global_rank == RANK and self.trainer.global_step in (0, 2):
            if PHASE.startswith("dies"):
                os._exit(7)
            raise KeyError(f"of the {phase}")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        for number, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            if self.global_step == 2 and number == 2:
                self.reaches("forward pass")
                x.register_hook(lambda _: self.reaches("backward pass"))
        loss: Tensor = x.square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.reaches("set-up")
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == 2:
            self.reaches("optimiser's step")

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == 2 and PHASE.endswith("checkpoint"):
            self.trainer.save_checkpoint("shards.ckpt")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.reaches("checkpoint")


def main() -> None:
    warnings.filterwarnings("ignore")
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=HeteroFSDPStrategy(shares=[3, 1], start_method=START_METHOD),
        max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(48, 8)), batch_size=4))
    sys.stdout.write("trained\n")


if __name__ == "__main__":
    main()
