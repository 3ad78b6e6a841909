"""A model whose layers sleep as long as they take on a device of some speed, as environment variables say."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Net", "loader"]

LAYERS, FEATURES = 12, 64
FORWARD_S = 0.0002  # per sample and layer; twice that backward
SPEED = float(os.environ.get("SLEEPING_SPEED", "1"))
PARAMETERS = int(os.environ.get("SLEEPING_PARAMETERS", "10000"))  # of each layer
BATCH = int(os.environ.get("SLEEPING_BATCH", "96"))


class _Sleeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        time.sleep(FORWARD_S / SPEED * len(x))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        time.sleep(2 * FORWARD_S / SPEED * len(gradients[0]))
        return gradients[0].clone()


class Layer(nn.Module):
    """A layer whose weights count, and take little time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(PARAMETERS))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, after a sleep."""
        slept: Tensor = _Sleeps.apply(x)  # type: ignore[no-untyped-call]
        return slept + self.weight.mean()


class Net(LightningModule):
    """Twelve layers, trained with SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*(Layer() for _ in range(LAYERS)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        loss: Tensor = self.model(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return two batches."""
        return loader(2 * BATCH, BATCH)


def loader(samples: int, batch_size: int) -> DataLoader[Any]:
    """Return batches of random numbers."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(samples, FEATURES, generator=generator)), batch_size)
