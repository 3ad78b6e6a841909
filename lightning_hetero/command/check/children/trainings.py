"""Small trainings that the checks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["FEATURES", "Numbered", "Small", "largest_difference", "loader", "numbers_of"]

FEATURES = 6


class Numbered(Dataset[Any]):
    """Samples from a fixed seed: features and a target.

    Args:
        size: Number of samples.
        dtype: Type of features and targets.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.features = torch.randn(size, FEATURES, generator=generator).to(dtype)
        self.targets = self.features.square().sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.features[index], self.targets[index]


class Small(LightningModule):
    """A small network with known weights.

    Args:
        dtype: Type of the weights.
        before: Function that each step calls with its number of samples, before its forward pass.
        layers: The layers; by default two linear ones with a hyperbolic tangent between them.
        adaptive: Whether the optimiser keeps moments of the gradients.
        lr: Learning rate of the other optimiser.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        before: Callable[[int], object] | None = None,
        layers: list[nn.Module] | None = None,
        *,
        adaptive: bool = False,
        lr: float = 0.02,
    ) -> None:
        super().__init__()
        self.model = nn.Sequential(*(layers or [nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)])).to(dtype)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.model.parameters():
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(values / max(parameter.shape[-1], 1) ** 0.5)
        self._before = before
        self._adaptive, self._lr = adaptive, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        features, targets = batch
        if self._before is not None:
            self._before(len(features))
        loss: Tensor = nn.functional.mse_loss(self.model(features), targets)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum, or AdamW."""
        if self._adaptive:
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=self._lr, momentum=0.9)


def loader(batch_size: int, size: int, dtype: torch.dtype = torch.float32, **options: Any) -> DataLoader[Any]:
    """Return a loader of numbered samples."""
    return DataLoader(Numbered(size, dtype), batch_size=batch_size, **options)


def numbers_of(module: nn.Module) -> Tensor:
    """Return all floating-point parameters and buffers as one tensor in float64 on the host."""
    values = [v.detach().double().cpu().flatten() for v in module.state_dict().values() if v.is_floating_point()]
    return torch.cat(values)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors; NaN where one of them holds NaN."""
    return float((one - other).abs().max())
