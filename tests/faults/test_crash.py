"""A rank is killed at any moment, and torchrun starts all of them again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from faults.job import Fault
from faults.launch import Ended, assert_whole, assert_whole_pipeline, attempts, job, one_node, run
from profiles import thorough

CHECKPOINT_EVERY = 4


def assert_nothing_half_written(folder: Path) -> None:
    paths = list(folder.glob("*.ckpt"))
    assert paths
    for path in paths:
        assert "state_dict" in torch.load(path, weights_only=False)


def assert_each_went_on(folder: Path, ended: Ended, faults: list[Fault]) -> None:
    """Check that every rank was killed that should be, and that each attempt began at a whole checkpoint."""
    assert ended.status == 0, ended.text
    assert all(f"rank {fault.rank}: kill in {fault.when}" in ended.text for fault in faults)
    first = attempts(folder)
    assert (len(first), first[0], first[1]) == (1 + len(faults), 0, 4)
    assert first == sorted(first)
    assert all(step % CHECKPOINT_EVERY == 0 for step in first)
    assert_nothing_half_written(folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [(1, 1, 0, 1), pytest.param((0, 0, 1, 0), marks=thorough)], ids=str)
def test_killed_in_tuning_replanning_checkpointing_and_validation(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    """Each attempt but the last is killed, at another moment; each goes on from the last checkpoint before it."""
    faults = [
        Fault(ranks[0], "kill", "step", 5),
        Fault(ranks[1], "kill", "replan"),
        Fault(ranks[2], "kill", "checkpoint", 13),
        Fault(ranks[3], "kill", "validation", 22),
    ]
    (ended,) = run(tmp_path, [one_node(2, job(tmp_path, 2, *faults, factors=[1, 3]), restarts=4)])
    assert_each_went_on(tmp_path, ended, faults)
    assert_whole(tmp_path, 2)


@pytest.mark.timeout(300)
def test_it_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """No restarts: the user starts it again, with three ranks instead of two."""
    fault = Fault(0, "kill", "checkpoint", 15)
    (ended,) = run(tmp_path, [one_node(2, job(tmp_path, 2, fault, factors=[1, 3]))])
    assert ended.status != 0
    assert "rank 0: kill in checkpoint" in ended.text
    assert list(tmp_path.glob(".*.part"))  # half of the file that was never moved to its place
    assert_nothing_half_written(tmp_path)
    (ended,) = run(tmp_path, [one_node(3, job(tmp_path, 3, fault, factors=[1, 3, 2]))])
    assert ended.status == 0, ended.text
    assert attempts(tmp_path) == [0, 12]
    assert_whole(tmp_path, 3)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [(1, 0, 1), pytest.param((0, 1, 0), marks=thorough)], ids=str)
def test_stages_are_killed_and_come_back(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    """The batches are shuffled by torch's own sampler, whose order a checkpoint of one device does not hold."""
    faults = [
        Fault(ranks[0], "kill", "step", 5),
        Fault(ranks[1], "kill", "checkpoint", 14),
        Fault(ranks[2], "kill", "validation", 22),
    ]
    (ended,) = run(tmp_path, [one_node(2, job(tmp_path, 2, *faults, pipeline=True), restarts=3)])
    assert_each_went_on(tmp_path, ended, faults)
    assert_whole_pipeline(tmp_path, 2)


@thorough
@pytest.mark.timeout(300)
def test_another_number_of_stages_goes_on(tmp_path: Path) -> None:
    fault = Fault(1, "kill", "step", 15)
    (ended,) = run(tmp_path, [one_node(2, job(tmp_path, 2, fault, pipeline=True))])
    assert ended.status != 0
    (ended,) = run(tmp_path, [one_node(3, job(tmp_path, 3, fault, pipeline=True))])
    assert ended.status == 0, ended.text
    assert attempts(tmp_path) == [0, 12]
    assert_whole_pipeline(tmp_path, 3)
