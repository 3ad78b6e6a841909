"""What a step logs for each micro-batch becomes what it would log for all of them, by the function that reduces it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric

from lightning_hetero.plugin.step.log_capture import LogCapture

SAMPLES, WEIGHTS = (2, 6), (0.25, 0.75)


def logged(values: Any, loss: bool = False, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return what is logged for two micro-batches of two and six samples, and how."""
    found: list[tuple[Any, dict[str, Any]]] = []
    capture = LogCapture(lambda name, value, *_, **how: found.append((value, how)))
    for value, capture.samples, capture.weight in zip(values, SAMPLES, WEIGHTS, strict=True):
        size = {} if "batch_size" not in options else {"batch_size": options["batch_size"] * capture.samples}
        capture("x", value, **{**options, **size})
    if loss:
        capture.note_losses(["x"])
    capture.flush()
    ((value, how),) = found
    return value, how


@pytest.mark.parametrize(
    ("values", "reduce_fx", "expected"),
    [
        ((1.0, 5.0), "mean", 4.0),
        ((1, 5), torch.mean, 4.0),
        ((1.0, 5.0), "sum", 6.0),
        ((1, 5), torch.sum, 6),
        ((1.0, 5.0), "max", 5.0),
        ((1.0, 5.0), torch.max, 5.0),
        ((1.0, 5.0), "min", 1.0),
        ((1.0, 5.0), min, 1.0),
        ((torch.tensor([1.0, 2.0]), torch.tensor([5.0, 2.0])), "mean", [4.0, 2.0]),
        ((1.0, 5.0), torch.median, 5.0),  # of which nothing is known: the last one
    ],
)
def test_values_are_combined_as_they_are_reduced(values: Any, reduce_fx: Any, expected: Any) -> None:
    value, _ = logged(values, reduce_fx=reduce_fx)
    torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected))


def test_losses_add_up_with_their_weights() -> None:
    """A part whose loss has no terms has no weight, and may not be a number."""
    assert float(logged((4.0, 8.0), loss=True)[0]) == 7.0
    assert float(logged((4, 8), loss=True)[0]) == 7.0


def test_metrics_count_each_micro_batch_themselves_and_sizes_add_up() -> None:
    metric = MeanMetric()
    assert logged((metric, metric))[0] is metric
    assert logged((1.0, 5.0), batch_size=1)[1]["batch_size"] == sum(SAMPLES)
