"""The reports of a run: lines, scalars and the record, with all of them and with none."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, make_trainer

from lightning_hetero import LoadBalancer
from lightning_hetero.balance.record.run_record import RunRecord
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.balance.types import BatchPlan
from lightning_hetero.testing import SlowDown

STEPS = 90


class Lines(ProgressBar):
    """A progress bar of the user that collects the lines printed above it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def disable(self) -> None: ...

    def print(self, *args: Any, **_: Any) -> None:
        self.lines += [line for text in args for line in str(text).splitlines()]


class Remembers(Logger):
    """A logger of the user that has no directory for files."""

    name = "own"
    version = 0
    save_dir = None

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ours = {name: value for name, value in metrics.items() if name.startswith("hetero")}
        if ours:
            self.logged.append((step, ours))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


@dataclass
class Seen:
    """The reports on one rank."""

    lines: list[str]
    logged: list[tuple[int | None, dict[str, float]]]
    files: list[str]
    record: RunRecord | None
    changes: list[tuple[int, BatchPlan]]
    bar_metrics: set[str]


def run(
    folder: Path, *, bar: bool, loggers: list[str], record: bool | str = True, own: list[Callback] | None = None
) -> Seen:
    os.chdir(folder)
    lines, remembers = Lines(), Remembers()
    balancer = LoadBalancer(record=record, progress_bar=bar)
    trainer = make_trainer(
        "hetero_ddp",
        dist.get_world_size(),
        [SlowDown([1.0, 2.0], 0.0004), balancer, *([lines] if bar else []), *(own or [])],
        max_steps=STEPS,
        enable_progress_bar=bar,
        log_every_n_steps=10,
        logger=[CSVLogger("logs") if name == "csv" else remembers for name in loggers],
    )
    trainer.fit(SmallModule(), DataLoader(Numbered(2000), batch_size=32))
    path = None if balancer.reporter is None else balancer.reporter.path
    dist.barrier()
    found = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    records = list(folder.rglob("hetero_run*.jsonl"))
    assert path is None, "the record is closed"
    return Seen(
        lines=lines.lines,
        logged=remembers.logged,
        files=found,
        record=parse_record(records[0].read_text().splitlines()) if records else None,
        changes=balancer.changes,
        bar_metrics=set(trainer.progress_bar_metrics),
    )


def test_everything_is_reported_once_and_on_rank_zero_only(ranks: RankPools, tmp_path: Path) -> None:
    zero, one = ranks.run(2, _run_with_all, tmp_path)
    assert zero.changes == one.changes
    assert (one.lines, one.logged) == ([], [])

    said = [line for line in zero.lines if line.startswith("hetero_ddp:")]
    assert "tuning the shares in at most 23 steps" in said[0]
    assert "tuning for at most" in said[1]
    assert any(line.startswith("speed-up ") for line in zero.lines), "the table is printed above the bar"
    assert max(map(len, zero.lines)) <= 200
    assert "hetero_efficiency" in zero.bar_metrics
    assert "hetero_efficiency" in one.bar_metrics, "metrics must be the same on all ranks"

    assert not [count for count in Counter(step for step, _ in zero.logged).values() if count > 1]
    steps = [step for step, _ in zero.logged if step is not None]
    assert steps == sorted(steps)
    assert max(steps) < STEPS
    first, last = zero.logged[0][1], zero.logged[-1][1]
    assert first["hetero/share/rank_0"] == 0.5
    assert last["hetero/share/rank_0"] > 0.6
    assert last["hetero/efficiency"] > first["hetero/efficiency"]

    assert [name for name in zero.files if "hetero" in name] == ["logs/lightning_logs/version_0/hetero_run.jsonl"]
    csv = (tmp_path / "logs/lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert "hetero/share/rank_0" in csv[0]
    share = csv[0].split(",").index("hetero/share/rank_0")
    assert sum(line.split(",")[share] != "" for line in csv[1:]) == len(zero.logged)

    record = zero.record
    assert record is not None
    assert [(change.step, BatchPlan(change.samples)) for change in record.changes] == zero.changes
    assert record.end is not None
    assert record.end.reason == "finished"
    assert record.windows[0].tuning
    assert not record.windows[-1].tuning
    assert record.windows[-1].overhead_s
    assert record.advice is not None
    assert record.advice.speed_up > 1.2


def _run_with_all(folder: Path) -> Seen:
    return run(folder, bar=True, loggers=["csv", "own"])


def test_nothing_is_written_without_a_logger(ranks: RankPools, tmp_path: Path) -> None:
    zero, _ = ranks.run(2, _run_with_nothing, tmp_path)
    assert zero.changes
    assert (zero.lines, zero.logged, zero.files) == ([], [], [])
    assert "hetero_efficiency" not in zero.bar_metrics


def _run_with_nothing(folder: Path) -> Seen:
    return run(folder, bar=False, loggers=[])


def test_the_record_is_written_to_a_given_directory_or_not_at_all(ranks: RankPools, tmp_path: Path) -> None:
    for name, record, files in (("a", "here", ["here/hetero_run.jsonl"]), ("b", False, [])):
        (tmp_path / name).mkdir()
        zero, _ = ranks.run(2, _run_with_record, tmp_path / name, record)
        assert zero.files == files


def _run_with_record(folder: Path, record: bool | str) -> Seen:
    return run(folder, bar=False, loggers=["own"], record=record)


def failed_run(folder: Path) -> str:
    with suppress(RuntimeError):
        run(folder, bar=False, loggers=["csv"], own=[_FailsEverywhere()])
    (path,) = folder.rglob("hetero_run.jsonl")
    record = parse_record(path.read_text().splitlines())
    assert record.end is not None
    return record.end.reason


class _FailsEverywhere(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 30:
            dist.barrier()
            raise RuntimeError("the disk is full")


def test_a_run_that_fails_says_why_in_its_record(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks.run(2, failed_run, tmp_path)[0] == "RuntimeError: the disk is full"
