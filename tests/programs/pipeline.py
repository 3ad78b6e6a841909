"""A user's script: ``pipeline.py STRATEGY WHAT ...``; ``WHAT`` goes wrong on one of three stages, or "well" on two."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroPipelineStrategy

__all__ = ["HeteroPipelineStrategy"]  # for the strategy's expression
WHAT = sys.argv[2]


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and WHAT == "layer":
            raise KeyError("of a layer")
        if WHAT == "planning" and dist.get_rank() == 1:
            raise ValueError("of rank 1 alone")
        return x


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)]
        if WHAT == "layer":
            layers[int(sys.argv[3])] = Fails()
        if WHAT == "planning":
            layers[0] = Fails()
        self.model = nn.Sequential(*layers)
        self.before = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        if WHAT == "trained before":
            x = self.before(x)
        if WHAT == "never":
            unused: Tensor = x.sum()
            return unused
        y = self.model(x)
        if WHAT == "twice":
            self.model(x)
        if WHAT == "loss":
            raise KeyError("of a loss")
        loss: Tensor = y.square().mean()
        return loss

    def on_train_start(self) -> None:
        if WHAT == "hook" and self.global_rank == 1:
            raise ValueError("of rank 1 alone")
        if WHAT == "alone" and self.trainer.is_global_zero:
            self.trainer.save_checkpoint("alone.ckpt")

    def on_train_end(self) -> None:
        if self.global_rank == 0:
            sys.stdout.write(f"trained {self.trainer.global_step}\n")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Saves(Callback):
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint("failed.ckpt")


class Data(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        if WHAT == "data" and index > 30:
            raise KeyError("of a sample")
        return super().__getitem__(index)  # type: ignore[no-untyped-call]


def main(strategy: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(1)
    trainer = Trainer(
        accelerator="cpu", devices=2 if WHAT == "well" else 3, strategy=strategy, max_steps=12, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Saves()] if "callback saves" in sys.argv else [],
    )  # fmt: skip
    try:
        trainer.fit(Module(), DataLoader(Data(torch.randn(48, 2)), batch_size=4))
    except KeyError:
        if "saves" in sys.argv:
            trainer.save_checkpoint("failed.ckpt")
        raise
    trainer.save_checkpoint("after.ckpt")


if __name__ == "__main__":
    main(eval(sys.argv[1]))
