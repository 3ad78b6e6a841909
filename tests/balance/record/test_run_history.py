from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from lightning_hetero.balance.record.run_history import RunHistory
from lightning_hetero.balance.record.run_record import Event, RunAdvice, RunChange, RunEnd, RunHeader, RunWindow
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.balance.types import DeviceProfile


def header(world_size: int) -> RunHeader:
    return RunHeader(
        "hetero_ddp", "now", 64 * world_size, tuple(DeviceProfile("h", "cpu", "c") for _ in range(world_size))
    )


def window(step: int, world_size: int, *, tuning: bool = False) -> RunWindow:
    own = tuple(0.123456 for _ in range(world_size))
    return RunWindow(step, step / 10, tuning, (64,) * world_size, own, own, own)


def written(history: RunHistory, events: list[Event]) -> list[str]:
    """Return the lines of the file after a writer has handled the events."""
    file = list(history.lines)
    for event in events:
        lines = history.add(event)
        file = list(history.lines) if lines is None else file + lines
    return file


@pytest.mark.parametrize("world_size", [2, 300])
def test_a_long_run_stays_small_and_keeps_what_matters(world_size: int) -> None:
    events: list[Event] = [window(step, world_size, tuning=True) for step in range(3, 13, 3)]
    events.append(RunChange(13, 1.3, (64,) * world_size, "why"))
    events.append(RunAdvice(13, 1.3, 0.1, 1.5, 0.9, ()))
    events += [window(step, world_size) for step in range(20, 60_000, 10)]
    events.append(RunEnd(60_000, 1.0, "finished"))
    most = 300_000
    file = written(RunHistory(header(world_size), most), events)
    assert sum(len(line) + 1 for line in file) < most + 100_000
    record = parse_record(file)
    steps = [w.step for w in record.windows]
    assert [w.step for w in record.windows if w.tuning] == [3, 6, 9, 12]
    assert len(record.changes) == 1
    assert record.advice is not None
    assert record.end is not None
    assert steps == sorted(set(steps))
    assert steps[-1] == 59_990, "the last look is always there"
    apart = [b - a for a, b in pairwise(steps[4:-1])]
    assert max(apart) <= 2 * min(apart), "what is left is spread evenly"


def test_a_short_run_is_kept_in_full() -> None:
    events: list[Event] = [window(step, 2) for step in range(100)]
    file = written(RunHistory(header(2)), events)
    assert parse_record(file).windows == tuple(events)


def test_too_many_changes_lose_their_older_half() -> None:
    events: list[Event] = [RunChange(step, step / 10, (64, 64), "again and again") for step in range(20_000)]
    file = written(RunHistory(header(2), 100_000), events)
    changes = parse_record(file).changes
    assert sum(map(len, file)) <= 100_000
    assert changes[0] == replace(changes[0], step=0)
    assert changes[-1].step == 19_999


def test_the_writer_appends_what_the_history_holds() -> None:
    rng = random.Random(0)
    history = RunHistory(header(3), 20_000)
    events: list[Event] = [
        RunChange(step, 0.0, (64,) * 3, "r") if rng.random() < 0.2 else window(step, 3, tuning=step < 50)
        for step in range(2000)
    ]
    assert written(history, events) == history.lines
