"""What `plan` says of a pipeline whose order of passes is planned."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_hetero.command.plan.pipeline.pipeline_cluster import Layer, PipelineCluster, PipelineDevice
from lightning_hetero.command.plan.pipeline.planned_order import OrderPrediction, predict_order

LAYERS = 12


def cluster(memory_bytes: float | None = None, parameter_bytes: float = 0.0, **changes: Any) -> PipelineCluster:
    """Return a fast and a slow device; a layer keeps one byte of activations per micro-batch."""
    devices = (PipelineDevice("fast", 2.0, memory_bytes), PipelineDevice("slow", 1.0, memory_bytes))
    layers = (Layer(0.004, 0.008, parameter_bytes, 0.0 if parameter_bytes else 1.0),) * LAYERS
    return PipelineCluster(**{"devices": devices, "layers": layers, "micro_batches": 8, **changes})


def predicted(*args: Any, **changes: Any) -> OrderPrediction:
    found = predict_order(cluster(*args, **changes))
    assert found is not None
    return found


def three(memory_bytes: float) -> dict[str, Any]:
    """Return a fast device and two slow ones."""
    return {"devices": tuple(PipelineDevice("", speed, memory_bytes) for speed in (2.0, 1.0, 1.0))}


def test_devices_need_memory_for_their_layers_with_gradients_and_states() -> None:
    found = predicted(1e9, 10.0, optimizer_states=2.0)
    assert found.needed_bytes is not None
    assert sum(found.needed_bytes) == LAYERS * 4 * 10
    assert found.needed_bytes[0] > found.needed_bytes[1], "the fast device has more layers"


def test_activations_count_up_to_the_memory_of_the_devices() -> None:
    free, tight = (predicted(**three(memory_bytes)) for memory_bytes in (1e9, 20.0))
    assert free.needed_bytes is not None
    assert tight.needed_bytes is not None
    assert max(free.needed_bytes) > 0.92 * 20 >= max(tight.needed_bytes) > 0
    assert free.step_s <= tight.step_s
    assert predicted().needed_bytes is None, "no memory is known"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"layers": (Layer(0.0001, 0.0002),) * LAYERS}, id="passes are short"),
        pytest.param({"layers": (Layer(0.004, 0.008),) * 5000}, id="planning would take long"),
        pytest.param({"devices": (PipelineDevice("one", 1.0, 5.0), PipelineDevice("two", 1.0, 5.0))}, id="too small"),
    ],
)
def test_nothing_is_planned(changes: dict[str, Any]) -> None:
    assert predict_order(cluster(**changes)) is None
