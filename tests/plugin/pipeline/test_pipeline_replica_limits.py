"""What replicas cannot train like one device is refused by name on every rank, and a failing rank is reported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import LightningModule
from replica_trainings import FEATURES, Case, loader_of
from torch import Tensor, nn
from torchmetrics import MeanMetric
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy, PipelineRecorder
from lightning_hetero.exceptions import RankFailedError, UnsupportedFeatureError

CASE = Case(((0, 2), (1,)))


class Counting(nn.Linear):
    """Keeps something in an attribute when it runs."""

    def __init__(self, kept: Any) -> None:
        super().__init__(FEATURES, FEATURES)
        self.kept: Any = None
        self.of = kept

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.of(x)
        return super().forward(x)


def module_of(variant: str) -> Any:
    """Return a module in whose training something is special."""
    outside = MeanMetric()

    class Special(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            layers: list[nn.Module] = [nn.Linear(FEATURES, FEATURES) for _ in range(4)]
            if variant == "normalisation":
                layers.insert(1, nn.BatchNorm1d(FEATURES))
            if variant == "spectral":
                layers[1] = nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, FEATURES))
            if variant == "layer":
                layers[0] = Counting(lambda x: float(x.detach().sum()))
            if variant == "cache":  # what does not depend on the samples may stay in a layer
                layers[0] = Counting(lambda x: torch.arange(x.shape[1]))
            self.model = nn.Sequential(*layers).double()
            self.metric = MeanMetric()
            self.losses: list[float] = []
            if variant == "evaluation":
                self.model.append(nn.BatchNorm1d(FEATURES).double().eval())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = (self.model(batch[0]) - batch[0]).square().mean()
            if variant == "attribute":
                self.losses.append(float(loss))
            if variant == "later" and self.global_step == 4:
                self.losses = [float(loss)]
            if variant == "compute":
                self.metric.update(loss.detach())
                self.log("metric", self.metric.compute())
            if variant == "elsewhere":
                outside.update(loss.detach())
            if variant == "made":
                self.log("made", MeanMetric().to(torch.float64)(loss.detach()))
            if variant == "settings":
                self.trainer.optimizers[0].param_groups[0]["lr"] = float(loss)
            if variant == "same settings":
                self.trainer.optimizers[0].param_groups[0]["lr"] = 0.1 / (1 + self.global_step)
            if variant == "stop" and dist.get_rank() == 1 and batch_idx == 1:
                self.trainer.should_stop = True
            if variant == "output":
                return {"loss": loss, "made": lambda: None}  # type: ignore[return-value]
            if variant == "death" and dist.get_rank() == 1 and batch_idx == 1:
                os._exit(1)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.losses.append(float((self.model(batch[0]) - batch[0]).square().mean()))

        def on_validation_epoch_end(self) -> None:
            self.log("validated", float(len(self.losses)))

        def configure_optimizers(self) -> Any:
            trained: list[Any] = list(self.parameters())
            if variant == "foreign":
                trained.append(torch.zeros(1, requires_grad=True))
            return torch.optim.SGD(trained, 0.1)

    return Special()


def fit(variant: str) -> tuple[str, str, float]:
    """Return the type and the message of the error on this rank, and what was logged."""
    strategy = HeteroPipelineStrategy(replicas=[list(r) for r in CASE.groups], speeds=[1, 2, 1], num_microbatches=2)
    callbacks: list[Any] = [PipelineRecorder()] if variant == "recorder" else []
    trainer = make_trainer(strategy, dist.get_world_size(), callbacks, max_epochs=1, limit_val_batches=None)
    if variant == "later":
        trainer.fit_loop.max_epochs = 4
    try:
        trainer.fit(module_of(variant), loader_of(CASE), loader_of(CASE, 11))
    except (UnsupportedFeatureError, RankFailedError, ValueError) as error:
        return type(error).__name__, str(error), 0.0
    return "", "", float(trainer.callback_metrics["validated"])


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("normalisation", ["batch normalisation", "model.1"]),
        ("spectral", ["a buffer", "_u"]),
        ("layer", ["an attribute", "model.0.kept"]),
        ("attribute", ["an attribute", "'losses'", "on_train_batch_end"]),
        ("later", ["an attribute", "'losses'"]),
        ("settings", ["settings of an optimiser"]),
        ("compute", ["`compute` of MeanMetric"]),
        ("elsewhere", ["attributes of the module", "MeanMetric"]),
        ("output", ["cannot send this"]),
        ("foreign", ["that is none of them"]),
        ("recorder", ["PipelineRecorder", "replicas=1"]),
    ],
)
def test_refusals_reach_every_rank(ranks: RankPools, variant: str, words: list[str]) -> None:
    for kind, message, _ in ranks.run(CASE.world_size, fit, variant, timeout_s=60):
        assert kind == "UnsupportedFeatureError"
        for word in (*words, "replicas"):
            assert word in message


@pytest.mark.parametrize("variant", ["", "cache", "evaluation", "made", "same settings"])
def test_what_is_alike_on_every_replica_is_allowed(ranks: RankPools, variant: str) -> None:
    for kind, message, validated in ranks.run(CASE.world_size, fit, variant, timeout_s=60):
        assert (kind, message) == ("", "")
        assert validated == 2  # both batches, on every rank


def stopped(variant: str) -> int:
    strategy = HeteroPipelineStrategy(replicas=[[0, 2], [1]], speeds=[1, 2, 1], num_microbatches=2)
    trainer = make_trainer(strategy, dist.get_world_size(), max_epochs=5, limit_val_batches=0)
    trainer.fit(module_of(variant), loader_of(CASE))
    return int(trainer.global_step)


def test_each_replica_can_end_the_training(ranks: RankPools) -> None:
    assert ranks.run(CASE.world_size, stopped, "stop", timeout_s=60) == [2, 2, 2]


def fit_and_write(folder: str) -> None:
    kind, message, _ = fit("death")
    Path(folder, str(dist.get_rank())).write_text(f"{kind}: {message}")


def test_a_rank_that_dies_is_named_on_the_others(ranks: RankPools, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1"):
        ranks.run(CASE.world_size, fit_and_write, str(tmp_path), timeout_s=60)
    for rank in (0, 2):
        assert "RankFailedError: Another rank has failed: rank 1" in (tmp_path / str(rank)).read_text()
