"""A rank that stops answering, for some seconds or for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.job import Fault
from faults.launch import assert_whole, found, job, one_node, run


@pytest.mark.timeout(300)
def test_a_training_survives_a_stall_shorter_than_the_time_out(tmp_path: Path) -> None:
    """One rank is stopped during the tuning, the other while it is watched; the shares end where the speeds are."""
    faults = [Fault(1, "stop", "step", 5, seconds=2), Fault(0, "stop", "step", 30, seconds=2)]
    argument = job(tmp_path, 2, *faults, factors=[1, 1], epochs=7)
    (ended,) = run(tmp_path, [one_node(2, argument)])
    assert ended.status == 0, ended.text
    assert all(f"rank {fault.rank}: stop in step" in ended.text for fault in faults)
    assert_whole(tmp_path, 2, epochs=7)
    changes = found(tmp_path, 2)[0]["changes"]
    assert not changes or abs(changes[-1][1][0] - 12) <= 2


@pytest.mark.timeout(300)
def test_a_stall_longer_than_the_time_out_ends_all_and_names_the_rank(tmp_path: Path) -> None:
    """Two jobs side by side, with another rank stopped in each; torchrun takes half a minute to end a stopped rank."""
    folders = [tmp_path / "0", tmp_path / "1"]
    commands = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        commands.append(one_node(2, job(folder, 2, Fault(rank, "stop", "step", 6), timeout_s=12)))
    for rank, ended in enumerate(run(tmp_path, commands)):
        assert ended.status != 0
        assert f"RankFailedError: Another rank has failed: rank {rank} does not answer" in ended.text
        assert not list(folders[rank].glob("found-*"))
