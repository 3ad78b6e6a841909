"""What is logged, reduced and counted is that of all samples, whatever a batch looks like and wherever it is logged."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ThroughputMonitor
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from training import Numbered, SmallModule, loss_of, make_trainer, small_network

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.exceptions import UnsupportedFeatureError

SIZE = 24


def as_lists(samples: list[Any]) -> Any:
    """Return a batch whose first tensor is that of one sample, as detection models take them."""
    return [s[1] for s in samples], [s[2] for s in samples], [s[0] for s in samples]


def as_dict(samples: list[Any]) -> Any:
    """Return a batch whose first tensor has nothing to do with the samples."""
    features, targets, indices = as_lists(samples)
    return {"classes": torch.zeros(7), "x": torch.stack(features), "y": torch.stack(targets), "i": indices}


def fields(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        return batch["x"], batch["y"]
    if isinstance(batch[0], list):
        return torch.stack(batch[0]), torch.stack(batch[1])
    return batch[1], batch[2]


class Logs(SmallModule):
    """Logs the loss wherever Lightning lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.decisions: list[tuple[bool, bool]] = []
        self.reduced: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        return loss_of(self.network, *fields(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * 0.0

    def log_everywhere(self, name: str, batch: Any) -> None:
        self.log(name, self.loss(batch), on_step=True, on_epoch=True, sync_dist=True)

    def on_validation_batch_start(self, batch: Any, *_: Any) -> None:
        self.log_everywhere("at start", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_everywhere("in step", batch)
        loss = self.loss(batch)
        self.losses.append(loss)
        strategy = self.trainer.strategy
        self.decisions.append(
            (strategy.reduce_boolean_decision(True, all=True), strategy.reduce_boolean_decision(False, all=False))
        )

    def on_validation_batch_end(self, outputs: Any, batch: Any, *_: Any) -> None:
        self.log_everywhere("at end", batch)

    def on_validation_epoch_end(self) -> None:
        self.log("collected", torch.stack(self.losses).mean(), sync_dist=True)
        self.log("the same everywhere", 5.0, sync_dist=True)
        self.log("most", torch.stack(self.losses).max(), sync_dist=True, reduce_fx="max")
        self.reduced.append(float(self.trainer.strategy.reduce(torch.ones(()), reduce_op="mean")))
        self.losses.clear()


def evaluate(strategy: Any, collate: Any, size: int) -> tuple[dict[str, float], list[Any], list[str]]:
    module = Logs()
    trainer = make_trainer(strategy, dist.get_world_size(), limit_val_batches=1.0)
    loader = DataLoader(Numbered(size), batch_size=4, collate_fn=collate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(module, loader, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, module.decisions, [str(w.message) for w in caught if "hetero_ddp" in str(w.message)]


def evaluate_unequally(size: int) -> Any:
    """Evaluate batches of several structures on unequal shares."""
    shares = [1.0, 3.0, 2.0][: dist.get_world_size()]
    return [evaluate(HeteroDDPStrategy(shares=shares), collate, size) for collate in (None, as_lists, as_dict)]


def errors_of(size: int) -> Tensor:
    data = Numbered(size)
    errors: Tensor = (small_network()(data.features) - data.targets).detach().square()
    return errors


@pytest.mark.parametrize(("world", "size"), [(2, SIZE), (3, 25), (3, 2)])
def test_epoch_means_have_the_weights_of_the_samples(ranks: RankPools, world: int, size: int) -> None:
    mean = errors_of(size).mean().item()
    for rank, of_structures in enumerate(ranks.run(world, evaluate_unequally, size)):
        for metrics, decisions, messages in of_structures:
            for name in ("in step_epoch", "at start_epoch", "at end_epoch"):
                assert metrics[name] == pytest.approx(mean, rel=1e-6), name
            if size != 25:  # parts of one size in all batches
                assert metrics["collected"] == pytest.approx(mean, rel=1e-6)
            assert metrics["the same everywhere"] == pytest.approx(5.0)
            assert set(decisions) == {(True, False)}
            assert bool(messages) == (rank == 0)
            if messages:
                (collected, reduced) = messages
                assert "`self.log('collected', ..., sync_dist=True)` in" in collected
                assert "test_logging.py:" in collected
                assert "`strategy.reduce` in" in reduced


def test_equal_shares_are_as_under_ddp(ranks: RankPools) -> None:
    """No weights, no messages."""
    expected = ranks.run(2, evaluate, "ddp", as_lists, SIZE)
    for (metrics, _, messages), (of_ddp, *_) in zip(
        ranks.run(2, evaluate, HeteroDDPStrategy(shares=[1, 1]), None, SIZE), expected, strict=True
    ):
        assert not messages
        assert metrics["collected"] == pytest.approx(of_ddp["collected"], rel=1e-6)


class Trains(SmallModule):
    """Logs in every hook of a training batch, and collects means over the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.before: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.shown = loss_of(self.network, *fields(batch)).detach()
        self.seen.append(self.shown)
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("start", loss_of(self.network, *fields(batch)).detach(), on_epoch=True, on_step=True, sync_dist=True)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("before", self.shown, on_epoch=True, sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("end", self.shown, on_epoch=True, on_step=True, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.log("collected", torch.stack(self.seen).mean(), sync_dist=True)
        self.seen.clear()


class Kept(Logger):
    """Keeps every row."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def train(strategy: Any) -> tuple[dict[str, float], list[dict[str, float]]]:
    module, monitor = Trains(), ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=4)
    logger = Kept()
    trainer = make_trainer(
        strategy, dist.get_world_size(), [monitor], max_epochs=2, max_steps=-1, logger=logger, log_every_n_steps=1
    )
    trainer.fit(module, DataLoader(Numbered(SIZE), batch_size=4))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, logger.rows


class InBackward(SmallModule):
    """Logs in the hooks of backward passes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batch = batch
        return loss_of(self.network, *fields(batch))

    def on_before_backward(self, loss: Tensor) -> None:
        self.log("given", loss, on_step=True, on_epoch=True, sync_dist=True)

    def on_after_backward(self) -> None:
        self.log("found", loss_of(self.network, *fields(self.batch)).detach(), on_epoch=True, sync_dist=True)


class LogsItself(Callback):
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = loss_of(pl_module.network, *fields(pl_module.batch)).detach()  # type: ignore[arg-type]
        self.log("by a callback", loss, on_epoch=True, sync_dist=True)  # type: ignore[attr-defined]


def log_in_backward(strategy: Any, micro_batch_size: int | None = None) -> dict[str, float]:
    if strategy == "hetero":
        strategy = HeteroDDPStrategy(shares=[1, 3], micro_batch_size=micro_batch_size)
    trainer = make_trainer(strategy, dist.get_world_size(), [LogsItself()], max_steps=6)
    trainer.fit(InBackward(), DataLoader(Numbered(SIZE), batch_size=4))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_hooks_of_backward_passes_log_what_ddp_logs(ranks: RankPools, micro_batch_size: int | None) -> None:
    expected = ranks.run(2, log_in_backward, "ddp")[0]
    for found in ranks.run(2, log_in_backward, "hetero", micro_batch_size, timeout_s=60):
        assert found == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}


def collect_with_early_stopping(strategy: Any) -> float:
    """Lightning calls hooks of these callbacks after those of the module."""
    if strategy == "hetero":
        strategy = HeteroDDPStrategy(shares=[1, 3])
    trainer = make_trainer(strategy, 2, [EarlyStopping("collected", patience=9)], max_epochs=1, max_steps=-1)
    trainer.fit(Trains(), DataLoader(Numbered(SIZE), batch_size=4))
    return float(trainer.callback_metrics["collected"])


def test_the_first_callback_may_be_early_stopping(ranks: RankPools) -> None:
    expected = ranks.run(2, collect_with_early_stopping, "ddp")[0]
    assert ranks.run(2, collect_with_early_stopping, "hetero") == [pytest.approx(expected, rel=1e-6)] * 2


class Communicates(SmallModule):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.metric = how, MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.how == "Metric.compute":
            self.metric.update(batch[1])
            self.metric.compute()
        elif self.how == "reduce":
            self.trainer.strategy.reduce(batch[1].mean())
        elif self.how == "broadcast":
            self.trainer.strategy.broadcast("text")
        else:
            dist.barrier()
        return super().training_step(batch, batch_idx)


def communicate(how: str) -> str:
    strategy = HeteroDDPStrategy(shares=[1, 1], micro_batch_size=2)
    with pytest.raises(UnsupportedFeatureError) as caught:
        make_trainer(strategy, 2, max_steps=2).fit(Communicates(how), DataLoader(Numbered(SIZE), batch_size=4))
    return str(caught.value)


@pytest.mark.parametrize("how", ["Metric.compute", "reduce", "broadcast", "barrier"])
def test_a_step_of_several_micro_batches_must_not_communicate(ranks: RankPools, how: str) -> None:
    for message in ranks.run(2, communicate, how, timeout_s=60):
        assert f"`{how}` cannot be called in a step that runs in several micro-batches" in message


def train_unequally() -> Any:
    return train(HeteroDDPStrategy(shares=[1, 3]))


def test_a_training_logs_what_ddp_logs(ranks: RankPools) -> None:
    (found, _), (of_peer, _) = ranks.run(2, train_unequally)
    expected = ranks.run(2, train, "ddp")[0][0]
    assert found == of_peer
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-9), name


def samples_per_batch() -> list[float]:
    """Return samples by the ThroughputMonitor over batches, which it calls a device's."""
    rows = train_unequally()[1]
    per_s = "train/device/{}_per_sec"
    return [
        row[per_s.format("samples")] / row[per_s.format("batches")] for row in rows if per_s.format("samples") in row
    ]


def test_a_monitor_of_throughput_counts_all_samples(ranks: RankPools) -> None:
    """Rank 0 has two of eight samples; the monitor multiplies its own by the number of ranks."""
    of_rank_zero = ranks.run(2, samples_per_batch)[0]
    assert of_rank_zero, "no rows"
    assert of_rank_zero == pytest.approx([4.0] * len(of_rank_zero))
