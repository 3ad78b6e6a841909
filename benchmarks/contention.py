"""Real contention for the processor: a quota for the thread that computes, by the kernel's cpu controller.

Only the computing thread is held back, so that the threads of gloo go on; a period of 10 ms keeps steps of 80 ms and
more even.  Needs a writable cpu controller of control groups v1.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["available", "quota"]

_CONTROLLER = Path("/sys/fs/cgroup/cpu")
_PERIOD_US = 10_000


def available() -> bool:
    """Tell whether this process may set quotas."""
    return (_CONTROLLER / "cpu.cfs_quota_us").exists() and os.access(_CONTROLLER, os.W_OK)


@contextmanager
def quota(part: float, core: int) -> Iterator[None]:
    """Give the calling thread ``part`` of one core, and no other core."""
    group = _CONTROLLER / f"lightning_hetero_benchmark_{os.getpid()}"
    group.mkdir()
    affinity = os.sched_getaffinity(0)
    try:
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(part * _PERIOD_US)))
        (group / "tasks").write_text(str(threading.get_native_id()))
        os.sched_setaffinity(0, {sorted(affinity)[core % len(affinity)]})
        yield
    finally:
        os.sched_setaffinity(0, affinity)
        # threads that were begun under the quota too
        for thread in (group / "tasks").read_text().split():
            (_CONTROLLER / "tasks").write_text(thread)
        group.rmdir()
