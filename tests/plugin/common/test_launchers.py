"""The registered names start real processes, as a user's script does; an error ends them all."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from profiles import THOROUGH, thorough
from scripts import run_script
from training import assert_close, reference_parameters

PROGRAMS = Path(__file__).parents[2] / "programs"
# Each new interpreter imports torch and Lightning, which takes seconds.  Errors that end a run in the same way are
# tried on forked ranks, and in the thorough profile on ranks that start as users' do.
POPEN, SPAWN = ("popen", "spawn") if THOROUGH else ("fork", "fork")


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Train on two ranks in a directory of its own."""
    return run_script(PROGRAMS / "train.py", *arguments, folder=folder, timeout_s=120)


@pytest.mark.parametrize(
    "name", ["hetero_ddp", "hetero_ddp_spawn", "hetero_ddp_fork_find_unused_parameters_true", "hetero_fsdp"]
)
def test_a_name_starts_ranks_that_train(tmp_path: Path, name: str) -> None:
    done = train(tmp_path, repr(name))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("parameters ")]
    found = [float(number) for number in line.removeprefix("parameters [").removesuffix("]").split(",")]
    expected = reference_parameters(46, 8, 12)
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            'HeteroDDPStrategy(shares={"Tesla K80": 1})',
            "`shares` must name the device of every rank, got ['Tesla K80']",
        ),
        ("HeteroDDPStrategy(shares=[1, 2, 3])", "`shares` must have one number per rank (2), got 3"),
        (
            f"HeteroDDPStrategy(max_batch_size=3, start_method={POPEN!r})",
            "`max_batch_size` must together hold the global batch of 8 samples",
        ),
    ],
)
def test_bad_input_ends_the_script_with_one_clear_error(tmp_path: Path, strategy: str, message: str) -> None:
    """A device name and a loader's batch size are known only to the ranks; all of them raise, none is left waiting."""
    done = train(tmp_path, strategy)
    assert done.returncode != 0
    assert message in done.stderr
    assert "parameters" not in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_for_which_nothing_fits_ends_all_and_is_named(tmp_path: Path, rank: int) -> None:
    """The peers wait in an all-reduce; they end in seconds, and the one that can still be reached says why too."""
    done = train(tmp_path, "HeteroDDPStrategy()", str(rank))
    assert done.returncode != 0
    assert f"RankOutOfMemoryError: Rank {rank} (cpu) ran out of memory in the backward pass of training" in done.stderr
    assert "a single sample does not fit" in done.stderr
    if rank == 1:
        assert f"RankFailedError: Another rank has failed: Rank {rank}" in done.stderr
    assert "parameters" not in done.stdout


def pipeline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Train stages in a directory of its own."""
    # a rank that can reach neither its peers nor the store looks for them for ten seconds
    return run_script(PROGRAMS / "pipeline.py", *arguments, folder=folder, timeout_s=120, patience_s=30)


@pytest.mark.parametrize("name", [pytest.param("hetero_pipeline", marks=thorough), "hetero_pipeline_spawn"])
def test_a_name_starts_a_pipeline(tmp_path: Path, name: str) -> None:
    done = pipeline(tmp_path, repr(name), "well")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["trained", "12"]
    assert re.search(r"hetero_pipeline: \[(1, 2|2, 1)\] layers per rank", done.stderr)
    assert "predicted" in done.stderr
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert saved["global_step"] == (12 if name == "hetero_pipeline" else 0)  # the spawning process makes no steps
    assert {tuple(value.shape) for value in saved["state_dict"].values()} == {(2, 2), (2,)}  # of all stages
    assert len(saved["state_dict"]) == 8


SPLIT = "HeteroPipelineStrategy(splits=[1, 2], num_microbatches=2, start_method={!r})"


@pytest.mark.parametrize(
    ("start_method", "what", "error"),
    [
        (POPEN, ("layer", "0"), "KeyError: 'of a layer'"),
        ("popen", ("layer", "1"), "KeyError: 'of a layer'"),
        pytest.param("spawn", ("layer", "0"), "KeyError: 'of a layer'", marks=thorough),
        (SPAWN, ("layer", "2"), "KeyError: 'of a layer'"),
        (POPEN, ("loss",), "KeyError: 'of a loss'"),
        (POPEN, ("data",), "KeyError: 'of a sample'"),
        pytest.param(
            "popen",
            ("data", "saves"),
            "RankFailedError: `hetero_pipeline` cannot save after a run has failed",
            marks=thorough,
        ),
        pytest.param(
            "popen",
            ("data", "callback saves"),
            "`hetero_pipeline` cannot save after a run has failed",
            marks=thorough,
        ),
        (POPEN, ("twice",), "to call the model exactly once, got a second call"),
        (POPEN, ("never",), "to call the model exactly once, got no call"),
        (POPEN, ("trained before",), "that are used before the model is called to be in its layers"),
        pytest.param(
            "popen",
            ("layer", "0", "callback saves"),
            "`hetero_pipeline` cannot save after a run has failed",
            marks=thorough,
        ),
    ],
)
def test_an_error_on_any_stage_ends_all_and_is_told(
    tmp_path: Path, start_method: str, what: tuple[str, ...], error: str
) -> None:
    done = pipeline(tmp_path, SPLIT.format(start_method), *what)
    assert done.returncode != 0
    assert error in done.stderr
    if "callback saves" in what:
        assert "KeyError: 'of a " in done.stderr
        assert "RankFailedError: `hetero" not in done.stderr
    assert "trained" not in done.stdout
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("strategy", "what", "reason"),
    [
        (f"HeteroPipelineStrategy(start_method={POPEN!r})", "planning", "ValueError: of rank 1 alone"),
        (SPLIT.format("popen"), "hook", "ValueError: of rank 1 alone"),
        (SPLIT.format(POPEN), "alone", "needs 'on_train_start' to save checkpoints"),
    ],
)
def test_peers_end_with_the_reason_of_the_rank_that_has_failed(
    tmp_path: Path, strategy: str, what: str, reason: str
) -> None:
    """While stages are planned, in a hook, and where one rank saves alone, which would wait for ever."""
    done = pipeline(tmp_path, strategy, what)
    assert done.returncode != 0
    assert reason in done.stderr
    if "popen" in strategy:  # of processes that are forked, the one that has forked them tells of the first error
        assert "RankFailedError: Another rank has failed: rank 1" in done.stderr
    assert "trained" not in done.stdout
