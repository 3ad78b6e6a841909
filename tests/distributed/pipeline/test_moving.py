"""What stands against moving tensors to other ranks is found, whatever optimisers and layers keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.distributed.pipeline.moving import digest_of_attributes, why_not_moved


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which torch sets when optimisers step first


def trained(weight: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def a_state_of_no_parameter(optimizer: Any) -> None:
    optimizer.state["all"] = {"step": torch.ones(1)}


def a_state_that_cannot_be_sent(optimizer: Any) -> None:
    next(iter(optimizer.state.values()))["scale"] = lambda x: x


def a_tensor_of_its_own(optimizer: Any) -> None:
    optimizer.average = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_state_of_no_parameter, "Adam keeps a state for 'str', which is none of its parameters"),
        (a_state_that_cannot_be_sent, "what an optimiser keeps for 'w' cannot be sent"),
        (a_tensor_of_its_own, "Adam keeps tensors in 'average' and not in the states of its parameters"),
        (lambda _: None, None),
    ],
)
def test_an_optimiser_that_keeps_more_than_can_move_is_named(change: Callable[[Any], None], reason: str | None) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = trained(weight)
    change(optimizer)
    found = why_not_moved([("w", weight)], [optimizer])
    assert (found is None) if reason is None else (found or "").startswith(reason)


def test_parameters_that_a_graph_holds_stay() -> None:
    weight = nn.Parameter(torch.ones(2))
    loss = weight.square().sum()  # of a step that keeps its loss
    assert "as graphs of earlier steps do" in (why_not_moved([("w", weight)], []) or "")
    del loss
    assert why_not_moved([("w", weight)], []) is None


class Keeps(nn.Module):
    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_what_layers_keep_is_compared_by_value(dtype: torch.dtype) -> None:
    def digest(*values: int) -> bytes:
        return digest_of_attributes([Keeps({"mean": torch.tensor(values).to(dtype), "steps": [3]})])

    assert digest(0, 1, 1) == digest(0, 1, 1)
    assert digest(0, 1, 1) != digest(0, 1, 0)


@pytest.mark.parametrize("kept", [[lambda: 0], torch.empty(2, device="meta")], ids=["a function", "no memory"])
def test_what_cannot_be_compared_counts_as_changed(kept: Any) -> None:
    """A layer moves only where it is certain that it is the same on both ranks."""
    digests = [digest_of_attributes([Keeps(kept)]) for _ in range(2)]
    assert digests[0] != digests[1]


def test_tensors_of_modules_are_no_plain_attributes() -> None:
    layer = nn.Linear(2, 2)
    before = digest_of_attributes([layer])
    with torch.no_grad():
        layer.weight.add_(1)
    assert digest_of_attributes([layer]) == before, "they move with the layer"
    assert isinstance(layer.weight, Tensor)
