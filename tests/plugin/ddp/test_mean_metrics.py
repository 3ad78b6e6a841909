"""A mean to which steps give one number per batch, such as the loss, is that of the global batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import RankPools
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from training import make_trainer

from lightning_hetero import HeteroDDPStrategy

SAMPLES, BATCH = 48, 8


class Kept(Callback):
    """Has a mean of its own."""

    def __init__(self) -> None:
        self.mean = MeanMetric()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.mean.update(outputs["loss"])


class Means(LightningModule):
    """Keeps its loss in means of all kinds."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Linear(3, 1).double()
        self.calls = calls
        self.loss_mean, self.validated = MeanMetric(), MeanMetric()
        self.several = MetricCollection({"in a collection": MeanMetric()})
        self.kept: dict[str, list[Any]] = {
            "in a dict": [MeanMetric()],
            "in a collection": [MetricCollection({"its": MeanMetric()})],
        }
        self.of_samples, self.weighted = MeanMetric(), MeanMetric()
        self.values: dict[str, float] = {}

    def losses(self, batch: Any) -> Tensor:
        losses: Tensor = (self.model(batch[0]) - 1).square()[:, 0]
        return losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        loss = losses.mean()
        if self.calls:
            self.loss_mean(loss.detach())
        else:
            self.loss_mean.update(float(loss))
        self.several.update(loss.detach())
        self.kept["in a dict"][0].update(np.float32(loss.detach()))
        self.kept["in a collection"][0].update(loss.detach())
        self.of_samples.update(losses.detach())
        self.weighted.update(loss.detach(), weight=len(losses))
        return loss

    def on_train_epoch_end(self) -> None:
        found: dict[str, Any] = {"loss": self.loss_mean, "dict": self.kept["in a dict"][0], "samples": self.of_samples}
        found["list"] = self.kept["in a collection"][0]["its"]
        found |= {"weighted": self.weighted, "collection": self.several["in a collection"]}
        found["callback"] = next(c for c in self.trainer.callbacks if isinstance(c, Kept)).mean  # type: ignore[attr-defined]
        self.values |= {name: float(mean.compute()) for name, mean in found.items()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.update(self.losses(batch).mean())

    def on_validation_epoch_end(self) -> None:
        self.values["validated"] = float(self.validated.compute())
        self.validated.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.02)


def train(kind: str) -> dict[str, float]:
    strategies: dict[str, Any] = {
        "ddp": DDPStrategy,
        "unequal": lambda: HeteroDDPStrategy(shares=[1, 3]),
        "micro-batches": lambda: HeteroDDPStrategy(shares=[1, 3], micro_batch_size=5),
    }
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64) * torch.arange(1, SAMPLES + 1)[:, None] / 8
    )
    module = Means(calls=kind == "unequal")
    trainer = make_trainer(strategies[kind](), 2, [Kept()], max_epochs=1, limit_val_batches=None)
    trainer.fit(module, DataLoader(TensorDataset(inputs), BATCH), DataLoader(TensorDataset(inputs[:32]), BATCH))
    return module.values


@pytest.mark.parametrize("kind", ["unequal", "micro-batches"])
def test_means_are_those_under_ddp(ranks: RankPools, kind: str) -> None:
    expected = ranks.run(2, train, "ddp")
    for rank, found in enumerate(ranks.run(2, train, kind)):
        assert found == pytest.approx(expected[rank], rel=1e-5)
