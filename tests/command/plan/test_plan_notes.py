"""What ``lightning-hetero plan`` says below its tables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command.plan.test_plan import EXAMPLES, PIPELINE, document, plan


def test_a_table_shows_the_first_of_many_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = "".join(f"  - {{name: kind {i}, samples_per_s: {100 + i}}}\n" for i in range(45))
    printed = plan(tmp_path, "global_batch_size: 450\ndevices:\n" + kinds, capsys)
    assert "kind 39" in printed
    assert "kind 40 " not in printed
    assert "and 5 more kinds of devices; --json lists all of them" in printed
    assert len(document(tmp_path, "global_batch_size: 450\ndevices:\n" + kinds, capsys)["devices"]) == 45


def test_notes_say_what_cannot_be_and_what_would_be_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def notes(text: str) -> str:
        return " ".join(plan(tmp_path, text, capsys).split())

    memory = "global_batch_size: 64\ndevices:\n  - {name: A, samples_per_s: 40, memory_gigabytes: 8}\n"
    memory += "  - {name: B, samples_per_s: 40, memory_gigabytes: 2}\n"
    printed = notes(memory + "memory_megabytes_per_sample: 100\n")
    assert "plain ddp, with equal shares, cannot train: " in printed
    assert "the memory of the devices is ignored without memory_megabytes_per_sample" in notes(memory)
    small = "global_batch_size: 3\ndevices:\n  - {name: A, samples_per_s: 20}\n  - {name: B, samples_per_s: 13}\n"
    found = re.search(
        r"rounding to whole samples costs (\d+)% of a step; use a global batch of about (\d+)", notes(small)
    )
    assert found is not None
    larger = small.replace("size: 3", f"size: {found[2]}")
    assert "rounding" not in notes(larger), "the advice is worth taking"


def test_a_device_that_is_faster_alone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PIPELINE + "  - {name: A, speed: 20}\n  - {name: B, speed: 1}\nnum_microbatches: 1\n"
    printed = " ".join(plan(tmp_path, text, capsys).split())
    found = document(tmp_path, text, capsys)
    times = found["step_time"] / found["alone"]["step_time"]
    assert times > 1
    assert f"use A alone: it is {times:.2f} times as fast as this pipeline" in printed


def test_a_pipe_that_is_closed_early_is_no_error() -> None:
    """As ``lightning-hetero plan cluster.yaml | head -1`` closes it."""
    command = [sys.executable, "-m", "lightning_hetero", "plan", str(EXAMPLES / "cluster.yaml"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 0)
