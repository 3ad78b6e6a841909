"""Layers are found in models, or named by whoever knows better; attributes that layers keep are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero import register_layers
from lightning_hetero.distributed.pipeline import units
from lightning_hetero.distributed.pipeline.borrowed import changed_attributes
from lightning_hetero.distributed.pipeline.replay import Replay
from lightning_hetero.distributed.pipeline.structure import Call
from lightning_hetero.distributed.pipeline.units import layers_in
from lightning_hetero.exceptions import UnsupportedFeatureError


class Entangled(nn.Module):
    """The last block uses what the first has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        first = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x)
        return x + first if self.training else x * first.mean()


def test_layers_that_are_registered_take_the_place_of_those_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which torch sets for its tensors without memory
    monkeypatch.setattr(units, "_registered", dict(units._registered))
    model, call = Entangled(), Call((torch.ones(2, 3),))
    assert layers_in(model) == [(block,) for block in model.blocks]
    output = Replay(model, layers_in(model))
    whole = WithHead(model)
    with pytest.raises(UnsupportedFeatureError, match=r"'head' also uses that of an earlier one.*register_layers"):
        Replay(whole, layers_in(whole)).prepare(call)
    register_layers("Entangled", lambda model: [model])
    replay = Replay(whole, layers_in(whole))
    assert len(replay.layers) == 2
    middle = replay.run(range(1), None, call)
    assert torch.equal(replay.run(range(1, 2), middle, call), whole(*call.args))
    assert len(output.layers) == 4


class WithHead(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.body = model
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class Keeping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.latest = x
        self.same = 1
        return x


def test_attributes_that_layers_keep_are_noticed() -> None:
    layer = Keeping()
    layer.same = 1
    with changed_attributes([layer]) as changed:
        layer(torch.ones(1))
    assert changed == ["Keeping.latest"]
