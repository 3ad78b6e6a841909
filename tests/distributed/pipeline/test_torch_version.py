"""A pipeline refuses a torch that could not train it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.distributed.pipeline import pipeline
from lightning_hetero.distributed.pipeline.chain import Chain
from lightning_hetero.distributed.pipeline.pipeline import Pipeline
from lightning_hetero.exceptions import UnsupportedFeatureError


@pytest.mark.parametrize(("version", "refused"), [("2.12.1+cu130", True), ("2.13.0+cpu", False), ("3.0.0", False)])
def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, refused: bool) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(pipeline, "open_channels", lambda *_: None)  # there is no process group

    calls = Chain([nn.Linear(1, 1), nn.Linear(1, 1)])

    def make() -> Pipeline:
        return Pipeline(
            calls,
            StagePlan(ranks=(0, 1), ends=(1, 2)),
            "gpipe",
            0,
            torch.device("cpu"),
        )

    if refused:
        with pytest.raises(UnsupportedFeatureError, match=r"needs PyTorch 2\.13 or later, got 2\.12\.1"):
            make()
    else:
        make()
