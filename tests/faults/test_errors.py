"""An error on one rank ends all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults.job import Fault
from faults.launch import assert_whole, attempts, job, one_node, run
from profiles import THOROUGH

CASES = {
    "loader": (Fault(1, "raise", "sample", 60), {}),
    "worker of a loader": (Fault(1, "raise", "sample", 60), {"workers": 1}),
    "callback": (Fault(0, "raise", "step", 6), {}),
    "callback in validation": (Fault(1, "raise", "validation"), {}),
}


@pytest.mark.timeout(300)
def test_it_ends_all_ranks_and_the_one_that_failed_says_why(tmp_path: Path) -> None:
    """All cases side by side: most of each is the start of its processes."""
    commands = []
    for name, (fault, settings) in CASES.items():
        (tmp_path / name).mkdir()
        # one as users start it, with ranks that run the script
        commands.append(one_node(2, job(tmp_path / name, 2, fault, **settings), script=THOROUGH or name == "loader"))
    for (name, (fault, _)), ended in zip(CASES.items(), run(tmp_path, commands), strict=True):
        assert ended.status == 1, name
        assert "OSError: raised by a test" in ended.text, name
        # torchrun names the rank, unless a peer, which was told and says so, has left first
        row = rf"rank +: {fault.rank} \(local_rank: {fault.rank}\)\s+exitcode +: (1|-15) "
        told = f"Another rank has failed: rank {fault.rank}"
        assert re.search(row, ended.text) or told in ended.text, name
        assert not list((tmp_path / name).glob("found-*")), name


@pytest.mark.timeout(300)
def test_a_rank_that_fails_saves_where_it_was(tmp_path: Path) -> None:
    """Nobody answers it: under ``ddp`` the ranks hang. Lightning counts the step twice that is made again."""
    faults = [
        Fault(0, "raise", "step", 6),
        Fault(1, "raise", "step", 11),  # the first of an epoch
        Fault(1, "kill", "step", 18),  # rank 0 saves, whose peer is gone
        Fault(1, "raise", "validation", 30),
    ]
    began = [0, 6, 11, 18]  # and one that has no step of its epoch left
    if THOROUGH:
        faults.insert(2, Fault(0, "kill", "step", 14))  # 12 was saved after an exception
        faults.insert(4, Fault(0, "raise", "step", 21))  # the last of an epoch
        began = [0, 6, 11, 12, 18, 21]
    (ended,) = run(tmp_path, [one_node(2, job(tmp_path, 2, *faults, save_on_exception=True), restarts=6)])
    assert ended.status == 0, ended.text
    assert all(f"rank {fault.rank}: {fault.what} in {fault.when}" in ended.text for fault in faults)
    assert attempts(tmp_path) == began
    assert_whole(tmp_path, 2)
