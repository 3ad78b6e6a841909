"""Validation, test and prediction see every sample once, whatever the shares and the size of the data."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from training import Numbered, SmallModule, loss_of, make_trainer, small_network

from lightning_hetero import HeteroDDPStrategy


class WithMetric(SmallModule):
    """Keeps a torchmetrics metric and a plain mean of the same thing; both have to be what one process finds.

    Its parameters never change, so that those of a fit are those of the other runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        index, features, targets = batch
        self.evaluated.append(index.tolist())
        errors = (self.network(features) - targets).square()
        self.metric.update(errors)
        self.log("metric", self.metric)
        self.log("logged", errors.mean(), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def evaluate(shares: Any, size: int, batch_size: int) -> tuple[list[list[list[int]]], list[dict[str, float]]]:
    """Validate and test on their own, and validate within a fit; return the samples and the metrics of each."""
    samples, metrics = [], []
    loader = DataLoader(Numbered(size), batch_size=batch_size)
    for run in ("validate", "test", "fit"):
        model = WithMetric()
        trainer = make_trainer(
            HeteroDDPStrategy(shares=shares), dist.get_world_size(), max_steps=1, limit_val_batches=1.0
        )
        if run == "fit":
            trainer.fit(model, DataLoader(Numbered(8), batch_size=4), loader)
        else:
            getattr(trainer, run)(model, loader, verbose=False)
        samples.append(model.evaluated)
        metrics.append({name: float(trainer.callback_metrics[name]) for name in ("metric", "logged")})
    return samples, metrics


@pytest.mark.parametrize(
    ("shares", "size", "batch_size"),
    [([1, 3], 21, 4), ([1, 1, 4], 25, 4), ([2, 1, 4], 2, 4), ([1, 2], 40, 5)],
)
def test_every_sample_is_evaluated_once(ranks: RankPools, shares: list[float], size: int, batch_size: int) -> None:
    """25 samples on three ranks leave one for the last batch, which takes two from the one before it."""
    world_size = len(shares)
    data, network = Numbered(size), small_network()
    expected = loss_of(network, data.features, data.targets).item()
    results = ranks.run(world_size, evaluate, shares, size, batch_size)
    for run in range(3):
        steps = [samples[run] for samples, _ in results]
        assert len({len(batches) for batches in steps}) == 1, "the ranks took different numbers of steps"
        seen = [index for batches in steps for batch in batches for index in batch]
        # with fewer samples than ranks a rank stands in with two of the others'; the metrics do not count them
        stand_ins = max(world_size - size, 0)
        assert set(seen) == set(range(size))
        assert len(seen) == size + 2 * stand_ins
        for _, metrics in results:
            assert metrics[run]["metric"] == pytest.approx(expected, rel=1e-6)
            assert metrics[run]["logged"] == pytest.approx(expected, rel=1e-6)


def evaluate_counting_stand_ins() -> list[float]:
    """Return the metrics of four samples, one a rank and step, on three ranks where nothing is taken back."""
    with mock.patch("lightning_hetero.plugin.ddp.batch_scope.stand_in", side_effect=lambda _: nullcontext()):
        return [metrics["metric"] for metrics in evaluate([2, 1, 4], 4, 1)[1]]


def test_a_stand_in_that_counts_in_a_metric_is_caught(ranks: RankPools) -> None:
    data = Numbered(4)
    expected = loss_of(small_network(), data.features, data.targets).item()
    for metrics in ranks.run(3, evaluate_counting_stand_ins):
        assert all(abs(metric - expected) > 1e-3 for metric in metrics)


class LogsOnStep(SmallModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("error", loss_of(self.network, batch[1], batch[2]), on_step=True, on_epoch=True, sync_dist=True)
        self.log("largest", batch[0].max().double(), on_step=True, on_epoch=False, reduce_fx="max", sync_dist=True)

    def on_validation_batch_end(self, *_: Any) -> None:
        results = self.trainer._results
        assert results is not None
        self.logged = {name: float(value) for name, value in results.metrics(on_step=True)["log"].items()}


def log_on_step(shares: Any) -> dict[str, float]:
    trainer = make_trainer(HeteroDDPStrategy(shares=shares), dist.get_world_size(), limit_val_batches=1.0)
    module = LogsOnStep()
    trainer.validate(module, DataLoader(Numbered(2), batch_size=4), verbose=False)
    return module.logged


def test_what_is_logged_on_a_step_is_that_of_all_samples(ranks: RankPools) -> None:
    """Of three ranks one stands in."""
    data = Numbered(2)
    expected = loss_of(small_network(), data.features, data.targets).item()
    for logged in ranks.run(3, log_on_step, [2, 1, 4]):
        assert logged["error_step"] == pytest.approx(expected, rel=1e-6)
        assert logged["largest"] == 1.0


class Writer(BasePredictionWriter):
    """Keeps what a prediction writer is given."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self.written: list[tuple[list[int], list[int]]] = []

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        self.written = list(zip(predictions, batch_indices[0], strict=True))


def predict(shares: Any, size: int) -> list[tuple[list[int], list[int]]]:
    writer = Writer()
    trainer = make_trainer(HeteroDDPStrategy(shares=shares), dist.get_world_size(), [writer])
    trainer.predict(SmallModule(), DataLoader(Numbered(size), batch_size=4), return_predictions=False)
    return writer.written


@pytest.mark.parametrize(("shares", "size"), [([1, 3], 21), ([1, 1, 4], 25), ([3, 1], 8), ([1, 1, 4], 2), ([1, 2], 1)])
def test_every_sample_is_predicted_once_and_the_writer_knows_which(
    ranks: RankPools, shares: list[float], size: int
) -> None:
    written = [batch for rank in ranks.run(len(shares), predict, shares, size) for batch in rank]
    assert sorted(index for predicted, _ in written for index in predicted) == list(range(size))
    assert all(predicted == indices for predicted, indices in written)
