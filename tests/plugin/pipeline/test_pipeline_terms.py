"""Losses averaged over weighted terms in a pipeline: micro-batches without terms, and numbers that cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import assert_close, flat, make_trainer

from lightning_hetero import HeteroPipelineStrategy

SIZE, BATCH_SIZE = 24, 8


def data() -> TensorDataset:
    """Weights of less than one, none in the second and last micro-batch of two samples, nor in the last batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SIZE, 3, generator=generator, dtype=torch.float64)
    position = torch.arange(SIZE)
    weights = torch.where((position % 4 < 2) & (position < 16), 0.05 + position / 100, 0.0).double()
    return TensorDataset(x, x.sum(1, keepdim=True), weights[:, None])


class Masked(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, weights = batch
        loss: Tensor = ((self.model(x) - y).square() * weights).sum() / weights.sum()
        self.log("loss", loss, on_step=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(wrong: float | None) -> tuple[list[float], list[float], float]:
    def terms(batch: Any) -> Any:
        return batch[2].sum() if wrong is None else wrong

    strategy = HeteroPipelineStrategy(splits=[2], num_microbatches=4, num_loss_terms=terms)
    module = Masked()
    trainer = make_trainer(strategy, dist.get_world_size(), max_epochs=2)
    trainer.fit(module, DataLoader(data(), BATCH_SIZE))
    return flat(module.model), module.losses, float(trainer.callback_metrics["loss"])


def expected() -> tuple[list[float], list[float]]:
    module, losses = Masked(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        for x, y, weights in DataLoader(data(), BATCH_SIZE):
            if weights.sum() == 0:
                losses.append(0.0)
                continue
            loss = ((module.model(x) - y).square() * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return flat(module.model), losses


def test_micro_batches_without_terms_count_nothing(ranks: RankPools) -> None:
    """Nor does a whole batch without terms, whose loss is 0 here."""
    parameters, losses = expected()
    for found, of_steps, logged in ranks.run(2, train, None):
        assert_close(found, parameters)
        assert of_steps == pytest.approx(losses)
        assert math.isfinite(logged)


def refused() -> str:
    try:
        train(-1.0)
    except Exception as error:
        return str(error)
    return ""


def test_a_wrong_number_is_refused_on_all_ranks(ranks: RankPools) -> None:
    for message in ranks.run(2, refused, timeout_s=60):
        assert (
            "`num_loss_terms` must return a finite number that is not negative, got -1.0 for micro-batch 0" in message
        )
