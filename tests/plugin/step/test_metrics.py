"""What is private in torchmetrics is there, and does what is relied on."""

from __future__ import annotations

import torch
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_hetero.plugin.step.metrics import _BOOKKEEPING, _restore, _state, set_step_value, step_value


def test_a_metric_is_as_it_was_after_an_update_is_taken_back() -> None:
    metric = MeanMetric()
    assert all(name in vars(metric) for name in _BOOKKEEPING)
    assert set(metric._defaults) == {"mean_value", "weight"}
    metric.update(torch.tensor(3.0))
    before = _state(metric)
    metric.update(torch.tensor(9.0))
    assert metric.compute() == 6.0
    _restore(metric, before)
    assert metric.compute() == 3.0
    assert metric.update_count == 1


def test_the_value_of_a_step_is_what_lightning_logs_for_it() -> None:
    metric = MulticlassAccuracy(num_classes=2, average="micro")
    metric(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert step_value(metric) == 0.5
    set_step_value(metric, torch.tensor(0.25))
    assert step_value(metric) == 0.25
