"""Validation, test and prediction see every sample once, whatever the shares and the size of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, default_collate
from torchmetrics import MeanMetric
from training import Numbered, SmallModule, loss_of, make_trainer, small_network

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.exceptions import UnsupportedFeatureError


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


class Streamed(IterableDataset[Any]):
    """Samples that the user has divided: rank 0 has the first five, the others have the rest."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        own = range(5) if dist.get_rank() == 0 else range(5, self.size)
        data = Numbered(self.size)
        return (data[index] for index in own)


class Named(IterableDataset[Any]):
    """Batches without tensors: one on rank 0, and three on rank 1."""

    def __iter__(self) -> Iterator[Any]:
        return iter([["a", "b"]] if dist.get_rank() == 0 else [["c"]] * 3)


def batches_of(size: int) -> Any:
    """Return a dataset of whole batches."""
    return [default_collate([Numbered(size)[i] for i in range(b, min(b + 4, size))]) for b in range(0, size, 4)]


class OwnBatches(BatchSampler):
    """Batches of sizes that only the user knows."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(LISTS)

    def __len__(self) -> int:
        return len(LISTS)


LISTS = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9, 10, 11], [12], [13, 14], [15, 16, 17, 18, 19, 20]]
LOADERS: dict[str, Callable[[], Any]] = {
    "divided by the user": lambda: DataLoader(Streamed(21), batch_size=4),
    "whole batches": lambda: DataLoader(batches_of(21), batch_size=None),
    "own batches": lambda: DataLoader(
        Numbered(21), batch_sampler=OwnBatches(SequentialSampler(range(21)), 4, drop_last=False)
    ),
}


def evaluate_loader(name: str) -> tuple[list[list[int]], float, float]:
    strategy = HeteroDDPStrategy(shares=[1.0, 3.0][: dist.get_world_size()])
    model, trainer = WithMetric(), make_trainer(strategy, dist.get_world_size(), limit_val_batches=1.0)
    trainer.validate(model, LOADERS[name](), verbose=False)
    found = trainer.callback_metrics
    return model.evaluated, float(found["metric"]), float(found["logged"])


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_that_cannot_be_divided_by_samples_are_kept_in_step(ranks: RankPools, name: str) -> None:
    """A rank whose batches have ended stands in, which counts nowhere."""
    data = Numbered(21)
    expected = loss_of(small_network(), data.features, data.targets).item()
    results = ranks.run(2, evaluate_loader, name)
    if name == "own batches":
        (alone,) = ranks.run(1, evaluate_loader, name)
        assert alone == (LISTS, pytest.approx(expected, rel=1e-6), pytest.approx(expected, rel=1e-6))
    assert len({len(batches) for batches, *_ in results}) == 1, "the ranks took different numbers of steps"
    seen = [index for batches, *_ in results for batch in batches for index in batch]
    assert set(seen) == set(range(21))
    for _, metric, logged in results:
        assert (metric, logged) == (pytest.approx(expected, rel=1e-6), pytest.approx(expected, rel=1e-6))


class Counts(SmallModule):
    """Logs a number of each batch, of whose samples nothing is known."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("long", float(len(batch)), batch_size=1, sync_dist=True)


class Fetches(SmallModule):
    def validation_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        next(dataloader_iter)


def validate_strangely() -> tuple[float, str]:
    """Validate on batches without tensors, and with a step that fetches its batches itself."""
    trainer = make_trainer(HeteroDDPStrategy(), 2, limit_val_batches=1.0)
    trainer.validate(Counts(), DataLoader(Named(), batch_size=None), verbose=False)
    long = float(trainer.callback_metrics["long"])
    with pytest.raises(UnsupportedFeatureError) as caught:
        trainer.validate(Fetches(), DataLoader(Numbered(8), batch_size=2), verbose=False)
    return long, str(caught.value)


def test_batches_whose_samples_are_not_known_count_the_same_and_must_be_given_to_the_step(ranks: RankPools) -> None:
    for long, message in ranks.run(2, validate_strangely):
        assert long == (2 + 3 * 1) / 4
        assert "got a step that takes `dataloader_iter`. Take `batch` instead" in message


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
