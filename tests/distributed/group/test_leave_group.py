"""A process leaves its group before it ends, and nothing about that can keep it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import atexit, sys, threading
import torch.distributed as dist
from lightning_hetero.distributed.group.leave_group import leave_group_at_exit

atexit.register(lambda: print("in a group:", dist.is_initialized()))  # runs after what is registered later
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
leave_group_at_exit()
leave_group_at_exit()
if sys.argv[2] == "fails":
    raise KeyError("raised by a test")
if sys.argv[2] == "peers are gone":
    dist.destroy_process_group = threading.Event().wait
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("what", "left"), [("ends", True), ("fails", False), ("peers are gone", False)])
def test_it_leaves_unless_it_fails(tmp_path: Path, what: str, left: bool) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.split() == ["in", "a", "group:", str(not left)], done.stderr
    assert (done.returncode == 0) == (what != "fails")
