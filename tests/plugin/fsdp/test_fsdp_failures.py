"""A failure on any rank, in any phase of a training with shards, ends all ranks within a minute, with the reason."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from profiles import THOROUGH, thorough
from scripts import run_script

PROGRAM = Path(__file__).parents[2] / "programs" / "shards.py"
# Each new interpreter imports torch and Lightning, which takes seconds.
START_METHOD = "popen" if THOROUGH else "fork"
PHASES = ["set-up", "forward pass", "backward pass", "optimiser's step", "checkpoint"]


def also_thorough(phase: str, rank: int) -> bool:
    return (phase, rank) not in (("backward pass", 1), ("optimiser's step", 0), ("checkpoint", 0))


@pytest.mark.parametrize(
    ("phase", "rank"),
    [
        pytest.param(phase, rank, marks=[thorough] if also_thorough(phase, rank) else [])
        for phase in PHASES
        for rank in (0, 1)
    ],
)
def test_an_error_in_any_phase_ends_all(tmp_path: Path, phase: str, rank: int) -> None:
    began = time.monotonic()
    done = run_script(PROGRAM, START_METHOD, phase, str(rank), folder=tmp_path, timeout_s=90, patience_s=30)
    assert done.returncode != 0
    assert f"KeyError: 'of the {phase}'" in done.stderr or f'KeyError: "of the {phase}"' in done.stderr
    assert "trained" not in done.stdout
    assert time.monotonic() - began < 60


@thorough
@pytest.mark.parametrize("phase", ["forward pass", "backward pass"])
def test_a_rank_that_dies_ends_all(tmp_path: Path, phase: str) -> None:
    began = time.monotonic()
    done = run_script(PROGRAM, START_METHOD, f"dies in {phase}", "1", folder=tmp_path, timeout_s=90, patience_s=30)
    assert done.returncode != 0
    assert "trained" not in done.stdout
    assert time.monotonic() - began < 60
