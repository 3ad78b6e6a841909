"""Close the process group before the interpreter shuts down.

gloo's threads may still hold tensors of the last collective when the interpreter shuts down, and then they abort the
process.  A training run that has finished would look like one that has failed, and torchrun would start it again
(https://github.com/pytorch/pytorch/pull/179291).
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from functools import cache

from lightning_hetero.distributed.host_group import close_host_group, gloo_is_used

__all__ = ["leave_group_at_exit", "stay_in_group"]

# Releases of Python 3.12 start no thread at exit, at least early ones.
_START_BEFORE_EXIT = sys.version_info[:2] == (3, 12)
# A group whose peers are gone may wait for them until its time-out, which must not delay the end of this process.
_PATIENCE_S = 5.0


def leave_group_at_exit() -> None:
    """Close gloo's groups when this process exits, since its training has succeeded; may be called more than once."""
    atexit.unregister(_leave)
    atexit.register(_leave, *_waiting_thread(os.getpid()) if _START_BEFORE_EXIT else ())


def stay_in_group() -> None:
    """Leave the group open when this process exits, since it has failed.

    Its peers wait for it. If the group were closed first, they would fail before this process has announced why.
    """
    atexit.unregister(_leave)


@cache
def _waiting_thread(pid: int) -> tuple[threading.Thread, threading.Event]:
    """Return the thread that closes the group, and the event it waits for; a forked process needs its own."""
    exiting = threading.Event()

    def leave() -> None:
        exiting.wait()
        close_host_group()

    thread = threading.Thread(target=leave, name=f"leave group of process {pid}", daemon=True)
    thread.start()
    return thread, exiting


def _leave(thread: threading.Thread | None = None, exiting: threading.Event | None = None) -> None:
    failed = hasattr(sys, "last_type")
    if gloo_is_used() and not failed:
        if thread is None or exiting is None:
            thread, exiting = _waiting_thread(os.getpid())
        exiting.set()
        thread.join(_PATIENCE_S)
