"""The record on the disk: readable at every moment, never in the way of the training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_hetero.balance.record.run_record import RunChange, RunEnd, RunHeader, RunWindow
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.plugin.common.run_writer import RunWriter

HEADER = RunHeader("hetero_ddp", "now", 128, (DeviceProfile("h", "cpu", "c"),) * 2)
WINDOW = RunWindow(4, 1.0, True, (64, 64), (0.1, 0.2), (0.1, 0.0), (0.0, 0.0))


def test_the_file_is_readable_after_every_event(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "new" / "folder", HEADER)
    path = writer.path
    assert path is not None
    assert parse_record(path.read_text().splitlines()).header.global_batch_size == 128
    writer.add(WINDOW)
    writer.add(RunChange(5, 1.0, (85, 43), "faster"))
    # nothing is closed or flushed: a process that is killed now leaves this
    record = parse_record(path.read_text().splitlines())
    assert (len(record.windows), len(record.changes)) == (1, 1)
    writer.add(RunEnd(9, 2.0, "finished"))
    assert parse_record(path.read_text().splitlines()).end is not None
    assert [p.name for p in path.parent.iterdir()] == ["hetero_run.jsonl"]


def test_an_earlier_record_is_kept(tmp_path: Path) -> None:
    paths = [RunWriter(tmp_path, HEADER).path for _ in range(3)]
    assert [path.name for path in paths if path] == ["hetero_run.jsonl", "hetero_run-1.jsonl", "hetero_run-2.jsonl"]


def test_looks_are_written_together_every_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    writer = RunWriter(tmp_path, HEADER)
    path = writer.path
    assert path is not None
    counts = []
    for _ in range(9):
        now[0] += 0.5
        writer.add(WINDOW)
        counts.append(len(path.read_text().splitlines()) - 1)
    assert counts == [0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_a_place_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the record of this run cannot be written"):
        writer = RunWriter(tmp_path / "file" / "below", HEADER)
    writer.add(WINDOW)
    assert writer.path is None


def test_a_place_that_vanishes_costs_a_warning(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "gone", HEADER)
    shutil.rmtree(tmp_path / "gone")
    with pytest.warns(UserWarning, match="the record of this run cannot be written"):
        writer.add(RunChange(5, 1.0, (85, 43), "faster"))
    writer.add(RunEnd(9, 2.0, "finished"))
    assert list(tmp_path.iterdir()) == []
