"""A checkpoint is whole or not there, whenever the process that writes it is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy
from lightning_hetero.plugin.common.checkpoint_file import WholeFileCheckpointIO

SAVES_FOR_EVER = """
import sys, torch
from lightning_hetero.plugin.common.checkpoint_file import WholeFileCheckpointIO
writer, number = WholeFileCheckpointIO(), 0
while True:
    number += 1
    writer.save_checkpoint({"first": number, "numbers": torch.full((4_000_000,), number), "last": number}, sys.argv[1])
    print(number, flush=True)
"""


def test_whenever_it_is_killed_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "new" / "last.ckpt"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    try:
        for _ in range(20):
            process.stdout.readline()
            time.sleep(rng.random() * 0.03)
            process.send_signal(signal.SIGSTOP)  # what a kill at this moment would leave
            found = torch.load(path)
            assert found["first"] == found["last"] == found["numbers"][-1]
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
    assert set(os.listdir(path.parent)) <= {"last.ckpt", ".last.ckpt.part"}
    WholeFileCheckpointIO().save_checkpoint({"first": 0}, str(path))
    assert os.listdir(path.parent) == ["last.ckpt"], "what the killed process has left is used up"


def test_a_failure_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    writer = WholeFileCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)
    with pytest.raises(AttributeError):
        writer.save_checkpoint({"step": 2, "cannot be pickled": lambda: None}, path)
    assert torch.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("strategy", [HeteroDDPStrategy, HeteroPipelineStrategy])
def test_it_is_used_unless_the_user_has_a_way_of_their_own(strategy: type[HeteroDDPStrategy]) -> None:
    def trainer(*plugins: object, **arguments: object) -> Trainer:
        return Trainer(accelerator="cpu", devices=1, strategy=strategy(**arguments), plugins=list(plugins))  # type: ignore[arg-type]

    assert type(trainer().strategy.checkpoint_io) is WholeFileCheckpointIO
    assert type(trainer(TorchCheckpointIO()).strategy.checkpoint_io) is TorchCheckpointIO
    assert type(trainer(checkpoint_io=TorchCheckpointIO()).strategy.checkpoint_io) is TorchCheckpointIO
    wrapped = trainer(AsyncCheckpointIO()).strategy.checkpoint_io
    assert isinstance(wrapped, AsyncCheckpointIO)
    assert type(wrapped.checkpoint_io) is WholeFileCheckpointIO
