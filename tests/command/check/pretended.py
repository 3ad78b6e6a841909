"""What is no check, for ranks that need neither torch nor Lightning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.finding import Finding, at_most, failed, skipped
from lightning_hetero.exceptions import RankFailedError


def hangs(rank: Rank) -> Finding:
    """The last rank stops itself; the other waits, with children that ignore signals, one in a session of its own."""
    if rank.is_last:
        os.kill(os.getpid(), signal.SIGSTOP)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    for own_session in (False, True):
        subprocess.Popen([sys.executable, "-c", code], start_new_session=own_session)
    sys.stdout.write("waiting\n")
    sys.stdout.flush()
    time.sleep(600)
    raise AssertionError


def ends(rank: Rank) -> Finding:
    """Rank 0 ends without a word, and the other waits for it."""
    if rank.rank == 0:
        os._exit(3)
    time.sleep(600)
    raise AssertionError


def passes(rank: Rank) -> Finding:
    return at_most(1.0, 0.1 * (1 + rank.rank), "m", "a length")


def one_fails(rank: Rank) -> Finding:
    """The last rank measures too much."""
    return at_most(1.0, 5.0 if rank.is_last else 0.5, "m", f"of rank {rank.rank}")


def one_is_skipped(rank: Rank) -> Finding:
    return skipped("too old") if rank.is_last else at_most(1.0, 0.5, "m", "")


def all_raise(rank: Rank) -> Finding:
    """The last rank fails by itself, the others because of it."""
    if rank.is_last:
        raise OSError("a first line\na second one")
    raise RankFailedError("Another rank has failed: rank 1")


def leaves_a_process(rank: Rank) -> Finding:
    """It is still there when the rank has ended."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    time.sleep(0.5)  # for the command to see it
    return passes(rank) if rank.ranks else failed("")
