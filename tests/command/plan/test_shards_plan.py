"""The prediction for shards: memory, weights, and a step in which transfers overlap."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.shards.step import ShardedStep
from lightning_hetero.command.main import main

TIMES = st.floats(0.0, 1.0)


@given(TIMES, TIMES, TIMES, st.integers(1, 40))
def test_a_step_is_between_its_bounds(own: float, gather: float, reduce: float, units: int) -> None:
    step = ShardedStep(own, gather, reduce, units)
    longest = max(own, step.link_s)
    assert longest - 1e-9 <= step.step_s <= own + step.link_s + 1e-9
    # each pass begins with a gather, and the last unit is reduced, while nothing is computed
    assert step.step_s >= own + 2 * gather + reduce - 1e-9


@given(TIMES, TIMES, TIMES, st.integers(1, 12))
def test_what_happens_in_a_step_is_in_order(own: float, gather: float, reduce: float, units: int) -> None:
    events = ShardedStep(own, gather, reduce, units).events()
    of = {kind: [e for e in events if e.kind == kind] for kind in ("gather", "reduce", "forward", "backward")}
    assert [len(of[kind]) for kind in of] == [2 * units, units, units, units]
    for carrier in (("gather", "reduce"), ("forward", "backward")):
        done = sorted((e for e in events if e.kind in carrier), key=lambda e: (e.begin_s, e.end_s))
        assert all(a.end_s <= b.begin_s + 1e-9 for a, b in pairwise(done))
    uses = [*of["forward"], *of["backward"]]
    for number, (gathered, used) in enumerate(zip(of["gather"], uses, strict=True)):
        assert gathered.unit == used.unit
        assert gathered.end_s <= used.begin_s + 1e-9
        if number >= 2:  # at most two are whole
            assert gathered.begin_s >= uses[number - 2].end_s - 1e-9
    for reduced in of["reduce"]:
        assert reduced.begin_s >= next(e.end_s for e in of["backward"] if e.unit == reduced.unit) - 1e-9


def test_fast_transfers_overlap_and_slow_ones_do_not() -> None:
    assert ShardedStep(3.0, 0.1, 0.1, 10).step_s == pytest.approx(3.3)
    assert ShardedStep(0.0, 1.0, 2.0, 10).step_s == pytest.approx(40.0)
    # 3 units of forward 1 and backward 2 each; gathering takes 2: the device waits in the forward pass
    assert ShardedStep(9.0, 2.0, 0.0, 3).step_s == pytest.approx(2 + 2 + 2 + 1 + 2 + 2 + 2 + 2)


FILE: dict[str, Any] = {
    "strategy": "hetero_fsdp",
    "global_batch_size": 96,
    "parameters": 1e9,
    "units": 20,
    "link_gigabits_per_s": 100,
    "memory_megabytes_per_sample": 60,
    "devices": [
        {"name": "large", "samples_per_s": 20, "memory_gigabytes": 24},
        {"name": "small", "samples_per_s": 10, "memory_gigabytes": 16},
    ],
}


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str, **changes: Any) -> tuple[int, str, str]:
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps({key: v for key, v in {**FILE, **changes}.items() if v is not None}), encoding="utf-8")
    code = main(["plan", str(path), *options])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_samples_go_by_speed_and_shards_by_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(tmp_path, capsys, "--json")[1])
    large, small = found["devices"]
    assert (large["samples"], small["samples"]) == (64, 32)
    left = [0.92 * 24e9 - 64 * 60e6 - 0.8e9, 0.92 * 16e9 - 32 * 60e6 - 0.8e9]
    assert large["shard"] == pytest.approx(left[0] / sum(left))
    assert found["sharded_bytes"] == pytest.approx(16e9)
    assert found["gathered_bytes"] == pytest.approx(0.8e9)
    assert large["needed_bytes"] == pytest.approx(16e9 * large["shard"] + 0.8e9 + 64 * 60e6)
    transfer = 8 * 4e9 / 20 * large["shard"] / 100e9
    assert found["step_time"] == pytest.approx(3.2 + 3 * transfer)
    assert found["even"]["step_time"] == pytest.approx(4.8 + 3 * 8 * 4e9 / 20 / 2 / 100e9)
    assert "speed-up 1.49" in run(tmp_path, capsys)[1]


def test_activations_that_are_not_given_are_ignored_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = " ".join(run(tmp_path, capsys, memory_megabytes_per_sample=None)[1].split())
    assert "activations are ignored; to include them, give memory_megabytes_per_sample" in printed
    assert "the memory of the devices is ignored" not in printed, "it holds the shards"


def test_what_does_not_fit_says_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(tmp_path, capsys, parameters=3e9)
    assert code != 0
    assert "are missing. A model of" in " ".join(error.split())
    small = [{**FILE["devices"][0]}, {**FILE["devices"][1], "memory_gigabytes": 11}]
    printed = " ".join(run(tmp_path, capsys, devices=small)[1].split())
    assert "equal batches and equal shards do not fit: small would need 11.7 GB and may use 10.1 GB" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": None}, "`units` must be"),
        ({"parameters": None, "link_gigabits_per_s": None}, "`parameters` or `gradient_megabytes` must be given"),
        ({"devices": [{"name": "a", "samples_per_s": 1}]}, "`memory_gigabytes` must be given for all devices"),
        ({"devices": [{"name": "a", "speed": 1, "memory_gigabytes": 9}], "link_gigabits_per_s": None}, "must have"),
        ({"strategy": "hetero_ddp"}, "`units` must be left out with `strategy: hetero_ddp`, because only hetero_fsdp"),
    ],
)
def test_wrong_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    code, _, error = run(tmp_path, capsys, **changes)
    assert code != 0
    assert message in " ".join(error.split())
