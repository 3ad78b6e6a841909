"""What is private in torchmetrics is there, and does what is relied on."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import CatMetric, MaxMetric, MeanMetric, Metric, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision
from torchmetrics.wrappers import Running

from lightning_hetero.plugin.step.metrics import (
    DiscardedUpdates,
    is_forward,
    patched_reductions,
    reductions_of,
    set_step_value,
    step_value,
    updates_of,
)


def undone(use: Any) -> None:
    updates = DiscardedUpdates()
    with updates.noticing():
        use()
    updates.restore()


@pytest.mark.parametrize(
    "metric",
    [MeanMetric(), SumMetric(), CatMetric(), MaxMetric(), MinMaxMetric(MeanMetric()), Running(SumMetric(), 2)],
    ids=lambda metric: type(metric).__name__,
)  # fmt: skip
@pytest.mark.parametrize("by", ["update", "forward"])
def test_a_metric_is_as_it_was_after_an_update_is_undone(metric: Metric, by: str) -> None:
    metric = copy.deepcopy(metric)
    metric.update(torch.tensor(3.0))
    before, updates = copy.deepcopy(metric).compute(), metric.update_count

    def use() -> None:
        (metric if by == "forward" else metric.update)(torch.tensor(9.0))
        metric.compute()

    undone(use)
    assert metric.update_count == updates
    assert str(metric.compute()) == str(before)
    metric.update(torch.tensor(5.0))
    other = copy.deepcopy(metric)
    other.reset()
    other.update(torch.tensor(3.0))
    other.update(torch.tensor(5.0))
    if not isinstance(metric, MinMaxMetric):  # whose extremes are those of all calls of `compute`
        assert str(metric.compute()) == str(other.compute())


def test_a_collection_that_first_sees_a_stand_in_decides_later_what_its_metrics_share() -> None:
    def collection() -> MetricCollection:
        kinds = {"micro": "micro", "macro": "macro"}
        return MetricCollection(
            {name: MulticlassAccuracy(2, average=average) for name, average in kinds.items()}  # type: ignore[arg-type]
            | {"precision": MulticlassPrecision(2)}
        )

    found, expected = collection(), collection()
    undone(lambda: found.update(torch.tensor([0, 0]), torch.tensor([0, 0])))
    for metrics in (found, expected):
        metrics.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    undone(lambda: found(torch.tensor([0, 0]), torch.tensor([1, 1])))
    assert found.compute_groups == expected.compute_groups
    for name, value in expected.compute().items():
        assert torch.equal(found.compute()[name], value)


def test_metrics_are_found_wherever_they_are() -> None:
    hidden = {"in a dict": [MeanMetric()]}
    created: list[MeanMetric] = []

    def use() -> None:
        hidden["in a dict"][0].update(1.0)
        created.append(MeanMetric())
        created[0].update(4.0)

    undone(use)
    assert hidden["in a dict"][0].update_count == 0
    assert created[0].mean_value == 0


class OwnState(Metric):
    """Keeps more than states."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="mean")
        self.seen: list[float] = []

    def update(self, value: Tensor) -> None:
        self.total = self.total + value
        self.seen.append(float(value))

    def compute(self) -> Tensor:
        return self.total


def test_what_synchronisation_relies_on() -> None:
    metric = OwnState()
    metric.update(torch.tensor(2.0))
    assert list(reductions_of(metric)) == ["total"]
    assert updates_of(metric, {}) == 1
    assert updates_of(metric, {"_update_count": 0}) == 0
    assert not is_forward(metric)

    def gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
        return [tensor, tensor + 2]

    def changed(self: Metric, *args: Any, **kwargs: Any) -> None:
        self.total = torch.tensor(5.0)
        with patched_reductions(self, {"total": torch.amax}):
            before(self, *args, **kwargs)

    before = Metric._sync_dist
    with mock.patch.object(Metric, "_sync_dist", changed):
        metric.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    assert metric.total == 7
    metric.unsync()
    assert metric.total == 2
    assert reductions_of(metric)["total"] is not torch.amax


def test_a_forward_computes_with_the_states_of_its_batch() -> None:
    during = []

    class Watching(OwnState):
        def compute(self) -> Tensor:
            during.append((is_forward(self), float(self.total)))
            return super().compute()

    metric = Watching()
    metric(torch.tensor(2.0))
    metric(torch.tensor(3.0))
    metric.compute()
    assert during == [(True, 2.0), (True, 3.0), (False, 5.0)]


def test_the_value_of_a_step_is_what_lightning_logs_for_it() -> None:
    metric = MulticlassAccuracy(num_classes=2, average="micro")
    metric(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert step_value(metric) == 0.5
    set_step_value(metric, torch.tensor(0.25))
    assert step_value(metric) == 0.25


def test_a_module_is_no_metric() -> None:
    undone(lambda: setattr(LightningModule(), "attribute", 1))
