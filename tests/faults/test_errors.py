"""An error on one rank ends all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults.job import Fault
from faults.launch import job, one_node, run

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
        commands.append(one_node(2, job(tmp_path / name, 2, fault, **settings)))
    for (name, (fault, _)), ended in zip(CASES.items(), run(tmp_path, commands), strict=True):
        assert ended.status == 1, name
        assert "OSError: as a test wants it" in ended.text, name
        # what torchrun says of it
        assert re.search(rf"rank +: {fault.rank} \(local_rank: {fault.rank}\)\s+exitcode +: 1 ", ended.text), name
        assert not list((tmp_path / name).glob("found-*")), name
