"""The models that are trained: a tiny one for devices of known speed, and real ones on real data."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

__all__ = ["WORKLOADS", "Workload"]


class Workload(LightningModule):
    """A network with its loss and its training data.

    Args:
        network: Network to train.
        loss: Loss function of the network's output and the target.
        data: Training data, which are repeated as often as needed.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], data: TensorDataset) -> None:
        super().__init__()
        self.network, self.loss, self.data = network, loss, data

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def samples(self, count: int) -> Dataset[Any]:
        """Return a dataset of ``count`` samples."""
        return _Repeated(self.data, count)


class _Repeated(Dataset[Any]):
    def __init__(self, data: TensorDataset, count: int) -> None:
        self._data, self._count = data, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._data[index % len(self._data)]


def light(width: int = 64) -> Workload:
    """Return a network whose own work is negligible; ``width`` sets the size of the all-reduce."""
    network = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 1))
    return Workload(network, nn.functional.mse_loss, TensorDataset(torch.randn(4096, 32), torch.randn(4096, 1)))


def heavy_gradients() -> Workload:
    """Return the light network with 2.6 MB of gradients (650,000 parameters)."""
    return light(19_000)


def convolutional() -> Workload:
    """Return a convolutional network on the scanned digits of scikit-learn, enlarged to 16 x 16 pixels."""
    digits = load_digits()
    images = nn.functional.interpolate(
        torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, scale_factor=2
    )
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    return Workload(network, nn.functional.cross_entropy, TensorDataset(images, torch.tensor(digits.target)))


class _CharacterModel(nn.Module):
    def __init__(self, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, characters: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(characters) + self.position, mask=self.mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)  # type: ignore[no-any-return]


def transformer(length: int = 64) -> Workload:
    """Return a character-level transformer on the source code of modules of Python's standard library."""
    text = "".join(inspect.getsource(module) for module in (inspect, json, textwrap)).encode()
    characters = torch.tensor(list(text[: (len(text) - 1) // length * length + 1]))
    data = TensorDataset(characters[:-1].view(-1, length), characters[1:].view(-1, length))
    return Workload(_CharacterModel(length=length), nn.functional.cross_entropy, data)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "light": light,
    "heavy gradients": heavy_gradients,
    "CNN": convolutional,
    "transformer": transformer,
}
