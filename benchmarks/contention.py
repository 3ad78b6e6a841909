"""Create real contention for the processor: the kernel's cpu controller gives the computing thread a quota.

Only the computing thread is throttled, so gloo's threads keep running.  A period of 10 ms keeps steps of 80 ms and more
even.  Needs a writable cpu controller of control groups v1.
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
    """Return whether this process may set quotas."""
    return (_CONTROLLER / "cpu.cfs_quota_us").exists() and os.access(_CONTROLLER, os.W_OK)


@contextmanager
def quota(part: float, core: int) -> Iterator[None]:
    """Restrict the calling thread to the fraction ``part`` of one core."""
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
        # Threads that were started under the quota have to leave the group too.
        for thread in (group / "tasks").read_text().split():
            (_CONTROLLER / "tasks").write_text(thread)
        group.rmdir()
