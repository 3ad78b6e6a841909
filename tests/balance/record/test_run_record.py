from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.record.run_record import (
    Event,
    RunAdvice,
    RunChange,
    RunEnd,
    RunHeader,
    RunPasses,
    RunStages,
    RunWindow,
    to_line,
)
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.exceptions import ConfigurationError

HEADER = RunHeader(
    "hetero_ddp",
    "2026-01-01T00:00:00+00:00",
    128,
    (DeviceProfile("a", "cuda:0", "V100"), DeviceProfile("b", "cuda:0", "K80")),
    "0.1.0",
)
WINDOW = RunWindow(5, 1.5, True, (64, 64), (0.25, 0.5), (0.25, 0.0), (0.001, 0.0), (0.01, 0.02), (0.004, 0.008), 0.125)
EVENTS: list[Event] = [
    WINDOW,
    RunChange(7, 2.0, (85, 43), "predicted: 1.48x as many samples/s"),
    RunAdvice(9, 3.0, 0.5, 1.48, 0.97, ("a <b>", "c")),
    RunStages(0, 0.0, (1, 0), (3, 9), (0.25, 0.5), (0.5, 1.0), 8, "1f1b", 0.0, 12.5, 17.0, ()),
    RunPasses(
        2, 4.0, (0, 1, 1, 0), ("forward", "backward", "input", "weight"), (0, 0, 0, 0), (0, 1, 2, 3), (1, 2, 3, 4)
    ),
    RunEnd(100, 60.0, "finished"),
]
LINES = [to_line(HEADER), *(to_line(event) for event in EVENTS)]


def test_a_record_is_read_as_it_was_written() -> None:
    record = parse_record(LINES)
    assert record.header == HEADER
    assert [record.windows, record.changes] == [(WINDOW,), (EVENTS[1],)]
    assert [record.advice, record.stages, record.passes, record.end] == EVENTS[2:]


def test_numbers_are_short_and_finite() -> None:
    line = to_line(replace(WINDOW, own_s=(1 / 3, float("nan"))))
    assert json.loads(line)["own_s"] == [0.333333, 0.0]


@pytest.mark.parametrize("cut", range(1, len(LINES[-1])))
def test_a_last_line_that_was_cut_off_is_ignored(cut: int) -> None:
    record = parse_record([*LINES[:-1], LINES[-1][:-cut]])
    assert record.end is None
    assert record.advice == EVENTS[2]


def test_events_of_later_versions_are_ignored() -> None:
    assert parse_record([LINES[0], '{"event":"later","x":1}', LINES[1]]).windows == (WINDOW,)


def changed(line: str, **values: object) -> str:
    return json.dumps({**json.loads(line), **values})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty file"),
        (["", " \n"], "empty file"),
        (["hello"], "must be the record of a run"),
        (["[1]"], "must be the record of a run"),
        ([changed(LINES[0], version=2)], "version 1, got 2"),
        ([changed(LINES[0], devices=[])], "`devices`"),
        ([changed(LINES[0], devices=[{}])], "`host` must be a string, got None"),
        ([changed(LINES[0], global_batch_size="x")], "`global_batch_size` must be an integer"),
        ([LINES[0], LINES[1][:-9], LINES[1]], "line 2"),
        ([LINES[0], changed(LINES[1], step=1.5)], "line 2: `step` must be an integer"),
        ([LINES[0], changed(LINES[1], step=True)], "`step` must be an integer"),
        ([LINES[0], changed(LINES[1], time_s="x")], "`time_s` must be a number of at least 0 and at most 1e\\+300"),
        ([LINES[0], changed(LINES[1], time_s=-1)], "`time_s` must be a number of at least 0 and at most 1e\\+300"),
        ([LINES[0], LINES[1].replace('"time_s":1.5', '"time_s":NaN'), LINES[1]], "line 2"),
        (
            [LINES[0], LINES[1].replace('"time_s":1.5', '"time_s":1e999')],
            "`time_s` must be a number of at least 0 and at most 1e\\+300",
        ),
        ([LINES[0], changed(LINES[1], tuning=1)], "`tuning` must be true or false"),
        ([LINES[0], changed(LINES[1], own_s=3)], "`own_s` must be a list"),
        ([LINES[0], changed(LINES[1], own_s=[1])], "`own_s` must have 2 entries, got 1"),
        ([LINES[0], changed(LINES[1], overhead_s=[])], "must both be present"),
        ([LINES[0], changed(LINES[2], reason=None)], "`reason` must be a string"),
        ([LINES[0], changed(LINES[4], ends=[3, 3])], "stages of all ranks"),
        (
            [LINES[0], changed(LINES[4], ranks=[0, 1, 0, 1], ends=[1, 2, 3, 4], forward_s=[], backward_s=[])],
            "stages of all",
        ),
        ([LINES[0], changed(LINES[5], stages=[0, 1, 3, 0])], "at most the number of ranks"),
        ([LINES[0], "[" * 100_000, LINES[1]], "line 2"),
    ],
)
def test_a_file_that_is_no_record_is_refused(lines: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("(", r"\(")):
        parse_record(lines)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.integers(0, len(LINES) - 1), st.data())
def test_any_other_value_gives_a_record_or_a_configuration_error(index: int, data: st.DataObject) -> None:
    values = json.loads(LINES[index])
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(JSON)
    with suppress(ConfigurationError):
        parse_record([*LINES[:index], json.dumps(values), *LINES[index + 1 :]])


@given(st.lists(st.text()))
def test_any_text_gives_a_configuration_error(lines: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        parse_record(lines)


def test_an_unknown_kind_of_pass_is_named() -> None:
    passes = EVENTS[4]
    assert isinstance(passes, RunPasses)
    line = to_line(replace(passes, kinds=("forward", "sideways", "input", "weight")))
    with pytest.raises(ConfigurationError, match="`kinds` must be forward, backward, input, weight, got 'sideways'"):
        parse_record([to_line(HEADER), line, LINES[-1]])
