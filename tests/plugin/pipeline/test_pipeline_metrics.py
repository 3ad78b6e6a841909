"""What is logged of a step is its value for the whole batch, although the step runs for one micro-batch at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, R2Score
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.plugin.step.metrics import forward_or_nan
from lightning_hetero.plugin.step.whole_batch import BatchValues


class Scored(LightningModule):
    """Logs metrics whose value for a batch is not the mean of those for its parts, and that some parts do not have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.logged, self.called, self.twice = R2Score(), R2Score(), R2Score()
        self.both = MetricCollection({"squared": MeanSquaredError(), "pearson": PearsonCorrCoef()})
        self.others = [R2Score()]
        self.losses, self.of_samples = MeanMetric(), MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        predicted = self.model(x).squeeze(1)
        self.logged(predicted, y)
        self.log("logged", self.logged, on_step=True, on_epoch=True)
        self.log("called", self.called(predicted, y), on_step=True)
        self.log("kept", self.others[0](predicted, y), on_step=True)
        self.log("first", self.twice(predicted, y))
        self.log("second", self.twice(predicted.square(), y))
        self.log_dict(self.both(predicted, y), on_step=True)
        self.log("largest", predicted.max(), on_step=True, reduce_fx="max")
        loss: Tensor = (predicted - y).square().mean()
        self.log("loss of the batch", self.losses(loss.detach()), on_step=True)
        self.losses.update(float(loss))
        self.of_samples.update((predicted - y).detach())
        self.log_dict({"losses": self.losses, "of samples": self.of_samples}, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class See(Callback):
    """Notes what was logged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def loader() -> DataLoader[Any]:
    """The last batch has six samples, so that two of its micro-batches have one, for which there is no score."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(30, *size, generator=generator, dtype=torch.float64) for size in ((4,), ()))
    return DataLoader(TensorDataset(x, y), 12)


def train() -> list[dict[str, float]]:
    see = See()
    strategy = HeteroPipelineStrategy(splits=[2], num_microbatches=4)
    make_trainer(strategy, dist.get_world_size(), [see], max_epochs=2).fit(Scored(), loader())
    return see.seen


def test_metrics_of_a_step_are_those_of_the_batch(ranks: RankPools) -> None:
    see = See()
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, callbacks=[see])  # fmt: skip
    trainer.fit(Scored(), loader())
    for seen in ranks.run(2, train):
        assert len(seen) == len(see.seen)
        for found, expected in zip(seen, see.seen, strict=True):
            assert found == pytest.approx(expected, rel=1e-6)


class Doubtful(Metric):
    """Has no value for fewer than two samples."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")
        self.total: Tensor
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        if x.isinf().any():
            raise ValueError("infinite")
        self.values.append(x)  # type: ignore[union-attr, operator]
        self.total += x.sum()

    def compute(self) -> Tensor:
        values = torch.cat(self.values)  # type: ignore[arg-type]
        if len(values) < 2:
            raise ValueError("too few")
        return values.std() + self.total


class DoubtfulInAllStates(Doubtful):
    """Needs what it has collected for its update."""

    full_state_update = True


@pytest.mark.parametrize("kind", [Doubtful, DoubtfulInAllStates])
def test_a_metric_without_a_value_for_a_part_keeps_what_it_has_collected(kind: type[Metric]) -> None:
    metric, expected = kind(), kind()
    for x in (torch.tensor([1.0, 2.0]), torch.tensor([4.0]), torch.tensor([3.0, 5.0])):
        value = forward_or_nan(metric, metric.forward, x)
        assert bool(value.isnan()) == (len(x) < 2)
        expected.update(x)
    assert metric.compute() == expected.compute()
    with pytest.raises(ValueError, match="infinite"):
        forward_or_nan(metric, metric.forward, torch.tensor([torch.inf]))


def test_values_that_no_metric_has_returned_are_unknown() -> None:
    metric = MeanSquaredError()
    values = BatchValues([metric])
    with values.of_step():
        values.next_micro_batch(0.5)
        first = metric(torch.zeros(2), torch.ones(2))
        values.next_micro_batch(0.5)
        second = metric(torch.zeros(1), 4 * torch.ones(1))
    for returned in (first, second):
        batch_value = values.of(returned)
        assert batch_value is not None
        assert batch_value() == 6.0
    assert values.of(first.clone()) is None
    assert metric.compute() == 6.0
    assert "forward" not in vars(metric)
