"""What a model takes is measured layer by layer, and its file is what the prediction of strategies reads."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
from harness import RankPools

from lightning_hetero.command.main import main

SCRIPT = """
import time

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Sleeping(nn.Module):
    def __init__(self, fixed_s, per_sample_s):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("shift", torch.zeros(100))
        self.fixed_s, self.per_sample_s = fixed_s, per_sample_s

    def forward(self, x):
        time.sleep(self.fixed_s + self.per_sample_s * len(x))
        return self.linear(x)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(Sleeping(0.02, 0.0), Sleeping(0.0, 0.004), nn.Linear(8, 1))
        self.steps = []

    def training_step(self, batch, batch_idx):
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def loader(size=16):
    return DataLoader(TensorDataset(torch.randn(64, 8)), size)


def single():
    return loader(1)


class WithData(Net):
    def train_dataloader(self):
        return loader()


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()


def build():
    return WithData()


number = 3
"""


Outcome = tuple[int, str, str]


def run_all(folder: str, commands: list[list[str]]) -> list[Outcome]:
    """Run commands in a folder that has the script, and return their exit statuses and what they have printed."""
    Path(folder, "profiled_net.py").write_text(SCRIPT, encoding="utf-8")
    before, found = os.getcwd(), []
    os.chdir(folder)
    try:
        for command in commands:
            with (
                mock.patch.object(sys, "path", [*sys.path]),
                mock.patch.dict(sys.modules),
                redirect_stdout(StringIO()) as out,
                redirect_stderr(StringIO()) as err,
            ):
                found.append((main([*command, "--accelerator", "cpu"]), out.getvalue(), err.getvalue()))
    finally:
        os.chdir(before)
    return found


def profiled(ranks: RankPools, folder: Path, commands: list[list[str]]) -> list[Outcome]:
    (found,) = ranks.run(1, run_all, str(folder), [["profile", *command] for command in commands], timeout_s=60)
    return list(found)


def test_overheads_and_times_per_sample_are_told_apart(
    ranks: RankPools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.json"
    outcomes = profiled(
        ranks,
        tmp_path,
        [
            ["profiled_net:Net", "--data", "profiled_net:loader", "--json", str(file)],
            ["profiled_net:build"],
            ["profiled_net:Net", "--data", "profiled_net:Data"],
        ],
    )
    for code, out, err in outcomes:
        assert code == 0, err
        assert "3 layers on cpu, with 16 samples:" in out
    found = json.loads(file.read_text(encoding="utf-8"))
    fixed, growing, last = found["layers"]
    # sleeping takes at least as long; a busy machine only adds to it
    assert fixed["forward_overhead_s"] + 16 * fixed["forward_s"] >= 0.02
    assert fixed["forward_overhead_s"] > 0.01 > 16 * fixed["forward_s"]
    assert 16 * growing["forward_s"] > 0.04 > growing["forward_overhead_s"]
    assert fixed["parameter_bytes"] == 4 * (64 + 8)
    assert fixed["constant_bytes"] == 4 * 100
    assert fixed["output_bytes"] == 4 * 8
    assert last["output_bytes"] == 4
    assert (found["optimizer_states"], found["samples"], found["module"]) == (1.0, 16, "profiled_net:Net")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "{strategy: auto, global_batch_size: 32, model: net.json, devices: [{name: one, count: 2, speed: 1}]}",
        encoding="utf-8",
    )
    assert main(["plan", str(cluster)]) == 0
    assert 'take Trainer(strategy="ddp", devices=2)' in capsys.readouterr().out


WRONG = [
    (["profiled_net"], "`MODULE:NAME` must be a module and a name in it"),
    (["nowhere:Net"], "`MODULE:NAME` must be what Python can import, got 'nowhere:Net'"),
    (["profiled_net:Nope"], "has no attribute 'Nope'"),
    (["profiled_net:loader"], "must be a LightningModule, or a function that returns one, got DataLoader"),
    (["profiled_net:build", "--data", "profiled_net:nope"], "`--data` must be what Python can import"),
    (["profiled_net:build", "--data", "profiled_net:number"], "`--data` must be a LightningDataModule"),
    (["profiled_net:Net"], "give `--data`"),
    (["profiled_net:Net", "--data", "profiled_net:single"], "must have at least two samples, got 1"),
]


def test_what_cannot_be_measured_is_named(ranks: RankPools, tmp_path: Path) -> None:
    outcomes = profiled(ranks, tmp_path, [command for command, _ in WRONG])
    for (command, message), (code, _, err) in zip(WRONG, outcomes, strict=True):
        assert code == 2, command
        assert message in err
