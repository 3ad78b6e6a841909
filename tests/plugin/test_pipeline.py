"""A model split over ranks trains as it does in one process; on real gloo ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanAbsoluteError
from training import make_trainer

from lightning_hetero.balance.stages import Schedule
from lightning_hetero.plugin.pipeline_strategy import HeteroPipelineStrategy

FEATURES = 6
BATCH_SIZE = 12
SAMPLES = 46  # three batches of 12 and one of 10


class Samples(Dataset[Any]):
    """Features and a target, from a fixed seed."""

    def __init__(self, size: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, FEATURES, generator=generator)
        self.y = self.x.square().sum(1, keepdim=True) + torch.randn(size, 1, generator=generator) / 10

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@dataclass(frozen=True)
class Case:
    """How a model is split and trained."""

    splits: tuple[int, ...]
    schedule: Schedule = "1f1b"
    micro_batches: int = 4
    kind: str = "mlp"
    trainer: tuple[tuple[str, Any], ...] = ()

    @property
    def world_size(self) -> int:
        return len(self.splits) + 1


def mlp() -> list[nn.Module]:
    layers: list[nn.Module] = []
    for a, b in ((FEATURES, 8), (8, 8), (8, 8), (8, 1)):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return layers[:-1]


class Mlp(LightningModule):
    """Knows nothing of this package: a temperature behind the model, two groups, a plateau scheduler, metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = nn.Sequential(*mlp())
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.error = MeanAbsoluteError()

    def predicted(self, x: Tensor) -> Tensor:
        prediction: Tensor = self.model(x) * self.temperature
        return prediction

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        predicted = self.predicted(x)
        loss = nn.functional.mse_loss(predicted, y)
        self.error(predicted, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("error", self.error, on_step=False, on_epoch=True)
        return {"loss": loss, "predicted": predicted}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.predicted(x), y), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log_dict({"test_loss": nn.functional.mse_loss(self.predicted(x), y), "batch": float(batch_idx)})

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.predicted(batch[0])

    def configure_optimizers(self) -> Any:
        weights = [p for n, p in self.named_parameters() if n.endswith("weight")]
        others = [p for n, p in self.named_parameters() if not n.endswith("weight")]
        optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.005}], 0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


KINDS = {"mlp": Mlp}


class Seen(Callback):
    """Keeps the loss of each step, as callbacks are told it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


@dataclass(frozen=True)
class Outcome:
    """What a training did, as seen on one rank."""

    losses: list[float]
    metrics: dict[str, float]
    parameters: dict[str, Tensor]
    rates: list[float]
    predictions: list[Tensor] = field(default_factory=list)


def model_of(case: Case) -> LightningModule:
    torch.manual_seed(3)
    return KINDS[case.kind]()


def train(case: Case) -> Outcome:
    """Train on the ranks of the harness, or in this process."""
    options: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": None, **dict(case.trainer)}
    seen = Seen()
    if "LOCAL_RANK" in os.environ:
        strategy: Any = HeteroPipelineStrategy(
            splits=list(case.splits), num_microbatches=case.micro_batches, schedule=case.schedule
        )
        trainer = make_trainer(strategy, dist.get_world_size(), [seen], **options)
        torch.manual_seed(17 if dist.get_rank() == 0 else 5)  # only rank 0's random numbers decide
    else:
        trainer = Trainer(
            accelerator="cpu", devices=1, callbacks=[seen], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options
        )  # fmt: skip
    model = model_of(case)
    torch.manual_seed(11)
    train_loader = DataLoader(Samples(), BATCH_SIZE, shuffle=True)
    trainer.fit(model, train_loader, DataLoader(Samples(30), BATCH_SIZE))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    metrics |= trainer.test(model, DataLoader(Samples(22), BATCH_SIZE), verbose=False)[0]
    predictions: list[Any] = trainer.predict(model, DataLoader(Samples(22), BATCH_SIZE)) or []
    return Outcome(seen.losses, metrics, parameters, rates, [p for p in predictions if p is not None])


@cache
def alone(kind: str, options: tuple[tuple[str, Any], ...]) -> Outcome:
    return train(Case((), kind=kind, trainer=options))


def check(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=tolerance)
    assert found.metrics == pytest.approx(expected.metrics, rel=tolerance, abs=tolerance)
    assert found.rates == expected.rates
    assert list(found.parameters) == list(expected.parameters)
    for name, value in found.parameters.items():
        assert float((value - expected.parameters[name]).abs().max()) < tolerance, name


def run(ranks: RankPools, case: Case, tolerance: float = 1e-6) -> Sequence[Outcome]:
    outcomes: list[Outcome] = ranks.run(case.world_size, train, case, timeout_s=90)
    expected = alone(case.kind, case.trainer)
    for outcome in outcomes:
        check(outcome, expected, tolerance)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(outcomes[0].predictions, expected.predictions, strict=True)
    )
    return outcomes


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("splits", [(), (2,), (5,), (1, 4), (1, 2, 6)])
def test_stages_train_as_one_process(ranks: RankPools, splits: tuple[int, ...], schedule: Schedule) -> None:
    run(ranks, Case(splits, schedule))
