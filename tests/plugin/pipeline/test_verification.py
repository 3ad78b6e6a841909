"""What layers compute is compared with what the model computes, as far as that is possible, and what else is noted."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_hetero.distributed.pipeline.structure import Call
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.hardware.memory import MemoryUse
from lightning_hetero.plugin.pipeline import verification
from lightning_hetero.plugin.pipeline.layers import Layers
from lightning_hetero.plugin.pipeline.verification import verify_layers

X = torch.ones(2, 3)


class Keeping(nn.Module):
    """A layer that leaves something in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.latest = x * 2
        return x


class Model(nn.Module):
    """Computes what its layers compute, or something else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Keeping())
        self.how = how

    def forward(self, x: Tensor) -> Any:
        if self.how == "fails":
            raise ValueError("only in training")
        found = self.layers(x)
        shapes = {"shape": found[:, :2], "in parts": (found, found), "nothing": found[:0]}
        return shapes.get(self.how, found + (1 if self.how == "values" else 0))


class Module(LightningModule):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.model = Model(how)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which torch sets for its tensors without memory
    monkeypatch.setattr(verification, "broadcast_from", lambda value, rank: value)
    monkeypatch.setattr(verification, "all_gather", lambda value: [value])


def verify(how: str, *, output: Any = None, certain: bool = False) -> list[Call]:
    """Verify a module on a rank that has all of it; return the calls of its layers."""
    module, calls = Module(how), []
    copies = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    placement: Any = SimpleNamespace(own_layers=[*module.model.layers], broadcast_all=lambda rank: copies)
    found: Any = SimpleNamespace(layers=[*module.model.layers])

    def evaluate(call: Call) -> list[Any]:
        calls.append(call)
        value = module.model.layers(*call.args)
        return [value if output is None else output(value)]

    verify_layers(module, Layers(module.model, found, certain), placement, evaluate, 0, Call((X,)))
    assert not hasattr(module.model.layers[2], "latest"), "nothing remains"
    return calls


def test_layers_that_are_all_of_the_model_need_no_comparison() -> None:
    assert verify("values", certain=True) == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("values", "values that differ by up to 1 where the largest is"),
        ("shape", r"a tensor of shape \(2, 4\) instead of a tensor of shape \(2, 2\)"),
    ],
)
def test_another_result_is_refused(how: str, message: str) -> None:
    with pytest.raises(
        UnsupportedFeatureError, match=f"must compute what `Model.forward\\(\\)` computes, got {message}"
    ):
        verify(how)


def test_a_result_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"got a NoneType instead of a tensor of shape \(2, 4\)"):
        verify("same", output=lambda _: [None])
    verify("nothing", output=lambda value: value[:0])
    verify("in parts", output=lambda value: (value,))  # the other one is that of an earlier stage


def test_what_layers_keep_and_what_was_not_compared_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(verification, "rank_zero_info", notes.append)
    monkeypatch.setattr(verification, "rank_zero_warn", notes.append)
    verify("same")
    assert [note.partition(" while")[0] for note in notes] == ["hetero_pipeline: layers keep Keeping.latest"]
    verify("fails")
    assert "hetero_pipeline: the layers were not compared with `Model.forward()`: only in training" in notes


@pytest.mark.parametrize("free", [100, 0])
def test_without_memory_for_a_second_model_shapes_are_compared(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """The memory that is free is asked of the device; the model takes 64 bytes."""
    notes: list[str] = []
    monkeypatch.setattr(verification, "rank_zero_info", notes.append)
    monkeypatch.setattr(verification, "rank_zero_warn", lambda _: None)
    use = MemoryUse(resident_bytes=0, peak_bytes=0, available_bytes=free)
    monkeypatch.setattr(verification, "meter_of", lambda device: SimpleNamespace(read=lambda: use))
    if free:
        with pytest.raises(UnsupportedFeatureError, match="values that differ"):
            verify("values")
        return
    verify("values")
    assert notes == ["hetero_pipeline: the layers were compared with the model by shape only, for memory"]
    with pytest.raises(UnsupportedFeatureError, match="instead of a tensor of shape"):
        verify("shape")


def test_a_system_that_does_not_say_what_is_free_compares_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    with pytest.raises(UnsupportedFeatureError, match="values that differ"):
        verify("values")
