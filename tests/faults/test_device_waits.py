"""A peer fails or dies while a rank waits in a call that no exception and no signal interrupts, as one of a device."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from faults.job import Fault, wait_in_c
from faults.launch import assert_whole, job, one_node, run
from harness import RankError, RankPool
from lightning.pytorch import Callback, LightningModule, Trainer
from profiles import thorough
from torch.utils.data import DataLoader
from training import Numbered, SmallModule

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.distributed.group import failure
from lightning_hetero.distributed.group.peer_watch import WatchTimes

PATIENCE_S = 1.0
TIMES = WatchTimes(heartbeat_s=0.2, silence_s=1.0, patience_s=PATIENCE_S)
SILENT_S = 4  # a rank that could not listen itself for a moment forgives its peer as long a silence


CASES = [
    ("raise", 1),
    ("kill", 0),  # which keeps the store, and to which all connections lead
    pytest.param("raise", 0, marks=thorough),
    pytest.param("kill", 1, marks=thorough),
]


class InStep(Callback):
    """Calls a function in the third step."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            time.sleep(0.5)  # a small training may get here before the ranks have their connections
            self.function(trainer)


def fit(folder: str, function: Any, workers: int = 0) -> Trainer:
    """Train in this process, which logs to a file of its own."""
    failure._TIMES = TIMES
    rank = dist.get_rank()
    handler = logging.FileHandler(Path(folder, f"log-{rank}"))
    logger = logging.getLogger("lightning_hetero")
    logger.addHandler(handler)
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=HeteroDDPStrategy(global_batch_size=6),
        max_epochs=1,
        callbacks=[InStep(function)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    try:
        trainer.fit(SmallModule(), DataLoader(Numbered(36), batch_size=2, num_workers=workers))
    finally:
        logger.removeHandler(handler)
        handler.close()
    return trainer


def with_one_that(folder: str, what: str, rank: int) -> None:
    """Train, until one rank fails or dies while the others wait."""

    def happen(trainer: Trainer) -> None:
        Path(folder, f"at-{trainer.global_rank}").touch()
        if trainer.global_rank != rank:
            wait_in_c()
        while len(list(Path(folder).glob("at-*"))) < trainer.world_size:
            time.sleep(0.01)
        Path(folder, "happened").touch()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("raised by a test")

    fit(folder, happen, workers=int(what == "kill"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("what", "rank"), CASES)
def test_the_others_say_who_failed_and_end(tmp_path: Path, what: str, rank: int) -> None:
    """Three ranks: the two others may know only through rank 0, or without it."""
    pool = RankPool(3)
    try:
        with pytest.raises(RankError) as error:
            pool.run(with_one_that, str(tmp_path), what, rank)
        happened = (tmp_path / "happened").stat().st_mtime
        others = {0, 1, 2} - {rank}
        for its in others:
            pool._processes[its].join(20)
        codes = [process.exitcode for process in pool._processes]
    finally:
        pool.close()
    assert [codes[its] for its in others] == [1, 1], error.value
    for its in others:
        assert (tmp_path / f"log-{its}").stat().st_mtime - happened < 5 + PATIENCE_S
        text = (tmp_path / f"log-{its}").read_text(encoding="utf-8")
        assert text.count("Another rank has failed: ") == 1
        assert f"Rank {its} has not ended within 1 s and waits at" in text
        assert "in wait_in_c" in text
        if what == "raise":
            assert f"Another rank has failed: rank {rank} with\nTraceback" in text
            assert "OSError: raised by a test" in text
        else:
            assert f"Another rank has failed: rank {rank} has died without a message" in text


def stopped_and_slow(folder: str) -> list[str]:
    """Train three times in one process, and return the threads that are left."""

    def stop(trainer: Trainer) -> None:
        if trainer.global_rank == 1:
            subprocess.Popen(["sh", "-c", f"sleep {SILENT_S}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)

    def slow(trainer: Trainer) -> None:
        if trainer.global_rank == 1:
            ctypes.CDLL(None).sleep(SILENT_S)  # other threads run, as beside a long call of a device

    def hold(trainer: Trainer) -> None:
        if trainer.global_rank == 1:
            ctypes.PyDLL(None).sleep(SILENT_S)  # no other thread runs

    before = set(threading.enumerate())
    for name, function in {"stopped": stop, "slow": slow, "held": hold}.items():
        Path(folder, name).mkdir(exist_ok=True)
        trainer = fit(str(Path(folder, name)), function)
        assert trainer.state.finished
        assert trainer.global_step == 6
    return [thread.name for thread in set(threading.enumerate()) - before if "watch" in thread.name]


@pytest.mark.timeout(120)
def test_a_rank_that_is_silent_or_slow_is_not_given_up(tmp_path: Path) -> None:
    pool = RankPool(2)
    try:
        assert pool.run(stopped_and_slow, str(tmp_path)) == [[], []]
    finally:
        pool.close()
    for name, warnings in {"stopped": 1, "slow": 0, "held": 1}.items():
        text = (tmp_path / name / "log-0").read_text(encoding="utf-8")
        assert text.count("Rank 1 has given no sign of life for ") == text.count("no sign of life") == warnings, name
        assert "no sign of life" not in (tmp_path / name / "log-1").read_text(encoding="utf-8"), name


@thorough
@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["kill", "raise"])
def test_torchrun_starts_them_again(tmp_path: Path, what: str) -> None:
    """torchrun waits half a minute for ranks that do not react to it; the second attempt reads nothing of the first."""
    fault = Fault(1, what, "step", 6, others_wait=True)
    (ended,) = run(tmp_path, [one_node(2, job(tmp_path, 2, fault), restarts=1)])
    assert ended.status == 0, ended.text
    assert ended.text.count("No exception reaches it there") == 1
    assert_whole(tmp_path, 2)
