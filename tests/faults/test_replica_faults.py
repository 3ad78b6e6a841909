"""Faults in trainings of several pipelines: all ranks end and say why, and what is started again loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faults.job import Fault
from faults.launch import Command, assert_whole_pipeline, attempts, job, one_node, run
from faults.test_crash import assert_each_went_on
from faults.test_nodes import node
from harness import free_port
from profiles import thorough

Groups = list[list[int]]

THREE: Groups = [[0, 2], [1]]
FOUR: Groups = [[0, 3], [1, 2]]


def replicas(folder: Path, groups: Groups, *faults: Fault, devices: int = 0, **settings: Any) -> str:
    """Return the argument of a job; no groups stand for one pipeline."""
    return job(folder, devices or sum(map(len, groups)), *faults, pipeline=True, replicas=groups, **settings)


@pytest.mark.timeout(300)
@thorough  # one pipeline is killed in the usual profile
@pytest.mark.parametrize("ranks", [(1, 0), (0, 1, 2)], ids=str)
def test_replicas_are_killed_and_come_back(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    """While gradients are added up, while rank 0 saves, and in validation."""
    moments = [("average", 5), ("checkpoint", 14), ("validation", 22)]
    faults = [Fault(rank, "kill", when, step) for rank, (when, step) in zip(ranks, moments, strict=False)]
    (ended,) = run(tmp_path, [one_node(3, replicas(tmp_path, THREE, *faults), restarts=3)])
    assert_each_went_on(tmp_path, ended, faults)
    assert_whole_pipeline(tmp_path, 3)


@thorough
@pytest.mark.timeout(300)
def test_other_groupings_go_on(tmp_path: Path) -> None:
    """Started by hand, each time after a kill: with two replicas, one pipeline, three replicas of one rank each."""
    faults = [Fault(1, "kill", "loss", 9), Fault(1, "kill", "step", 17), Fault(1, "kill", "average", 25)]
    groupings: list[Groups] = [THREE, [], [[0], [1], [2]], [[0, 1, 2]]]
    statuses = []
    for groups in groupings:
        (ended,) = run(tmp_path, [one_node(3, replicas(tmp_path, groups, *faults, devices=3))])
        statuses.append(ended.status)
    assert [status != 0 for status in statuses] == [True, True, True, False]
    assert attempts(tmp_path) == [0, 8, 16, 24]
    assert_whole_pipeline(tmp_path, 3)


@thorough
@pytest.mark.timeout(300)
def test_replicas_over_two_nodes_are_started_again(tmp_path: Path) -> None:
    port = free_port()
    argument = replicas(tmp_path, FOUR, Fault(2, "kill", "average", 14), devices=2, nodes=2)
    for ended in run(tmp_path, [node(n, 2, argument, "127.0.0.1", port, restarts=2) for n in range(2)]):
        assert ended.status == 0, ended.text
    assert attempts(tmp_path) == [0, 12]
    assert_whole_pipeline(tmp_path, 4)


ERRORS: dict[str, tuple[Groups, Fault, dict[str, Any]]] = {
    "loss of the first replica": (THREE, Fault(0, "raise", "loss", 6), {}),
    "loss of the second": (FOUR, Fault(1, "raise", "loss", 6), {}),
    "callback": (THREE, Fault(2, "raise", "step", 6), {}),
    "callback in validation": (FOUR, Fault(2, "raise", "validation"), {}),
    "gradients": (THREE, Fault(1, "raise", "average", 6), {}),
    "loader": (FOUR, Fault(0, "raise", "sample", 150), {}),
    "worker of the loader": (THREE, Fault(0, "raise", "sample", 150), {"workers": 1}),
}


@thorough
@pytest.mark.timeout(300)
def test_an_error_in_any_replica_ends_all_and_is_told(tmp_path: Path) -> None:
    commands: list[Command] = []
    for name, (groups, fault, settings) in ERRORS.items():
        (tmp_path / name).mkdir()
        commands.append(one_node(sum(map(len, groups)), replicas(tmp_path / name, groups, fault, **settings)))
    for name, ended in zip(ERRORS, run(tmp_path, commands), strict=True):
        assert ended.status == 1, name
        assert "OSError: raised by a test" in ended.text, name
        assert not list((tmp_path / name).glob("found-*")), name


@thorough
@pytest.mark.timeout(300)
def test_a_rank_of_a_replica_that_stalls_for_too_long_is_named(tmp_path: Path) -> None:
    """In its loss, between stages, and while gradients are added up."""
    faults = [Fault(0, "stop", "loss", 6), Fault(2, "stop", "step", 6), Fault(1, "stop", "average", 6)]
    commands: list[Command] = []
    for fault in faults:
        folder = tmp_path / str(fault.rank)
        folder.mkdir()
        commands.append(one_node(3, replicas(folder, THREE, fault, timeout_s=12)))
    for fault, ended in zip(faults, run(tmp_path, commands), strict=True):
        assert ended.status != 0
        assert f"RankFailedError: Another rank has failed: rank {fault.rank} does not answer" in ended.text
        assert not list((tmp_path / str(fault.rank)).glob("found-*"))


@thorough
@pytest.mark.timeout(300)
def test_replicas_survive_a_stall_shorter_than_the_time_out(tmp_path: Path) -> None:
    (ended,) = run(tmp_path, [one_node(3, replicas(tmp_path, THREE, Fault(1, "stop", "average", 6, seconds=2)))])
    assert ended.status == 0, ended.text
    assert_whole_pipeline(tmp_path, 3)
