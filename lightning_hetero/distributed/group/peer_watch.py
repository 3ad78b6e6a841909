"""Notice that a peer has failed or died although this rank waits in a device call, which no exception reaches.

Each rank has one small thread.  Those of the other ranks keep a TCP connection to that of rank 0, over which they tell
of failures and send a sign of life every few seconds.

- A rank that fails says so; rank 0 passes it on.
- When a process dies, the system closes its connections.  That is the only sign that counts as death: the connection
  closed without a word of leave, and nobody returned to it, or, at rank 0, nobody listens any more.  Time does not
  count, because a rank that is stopped, in a debugger, in a long device call, or whose machine sleeps keeps its
  connections.  (The identifiers of processes would say the same for one machine only.)
- Silence is told once and ends nothing: the time-out of the process group does.

gloo raises in the main thread when a peer is gone, and that is preferred: this thread ends the process only where the
main thread has not left by itself.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lightning_hetero.distributed.group.end_process import end_process, where_main_thread_waits
from lightning_hetero.distributed.group.peer_links import Hub, Link

__all__ = ["PeerWatch", "WatchTimes"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchTimes:
    """How long a watch waits for what, in seconds.

    Attributes:
        heartbeat_s: Between two signs of life.
        silence_s: Without a sign of life until that is told.
        patience_s: For the main thread to leave by itself after a peer has failed. gloo takes some seconds.
        teardown_s: For the tear-down of a run that has failed, which moves the model to the host.
        excuse_s: For a checkpoint or callbacks after a failure.
    """

    heartbeat_s: float = 5.0
    silence_s: float = 60.0
    patience_s: float = 10.0
    teardown_s: float = 30.0
    excuse_s: float = 300.0


class PeerWatch:
    """Watches the peers from a thread of its own, from construction to :meth:`stop`.

    Args:
        link: Connections of this rank.
        rank: Rank of this process.
        is_excused: Returns whether the main thread does something after a failure that should not be cut off.
        times: How long to wait for what.
    """

    def __init__(self, link: Link, rank: int, is_excused: Callable[[], bool], times: WatchTimes) -> None:
        self.reason: str | None = None
        """Why a peer has failed; None if none has, or if this rank has failed first."""
        self._own = False
        self._since: float | None = None
        self._patience_s = times.patience_s
        self._first_noticed = 0.0
        self._link = link
        self._rank = rank
        self._is_excused = is_excused
        self._times = times
        self._told_silent: set[int] = set()
        self._process = os.getpid()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch of peers", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a daemon thread must not be inside the store when the interpreter ends

    def tell(self, reason: str) -> None:
        """Tell the peers why this rank fails; the first reason of all ranks counts."""
        if self.reason is None and not self._own and os.getpid() == self._process:
            self._own = True
            self._link.failed = reason
            self._link.send_to_all("failed", reason)

    def begin_teardown(self) -> None:
        """Expect :meth:`stop` soon, since the run has failed: the tear-down may wait for the device."""
        self._is_excused = lambda: False
        self._patience_s = self._times.teardown_s
        self._since = time.monotonic()

    def stop(self) -> None:
        """Leave the peers in good order; may be called more than once."""
        if os.getpid() == self._process:
            atexit.unregister(self.stop)
            self._stopping.set()
            self._link.wake()
            self._thread.join(2.0)

    def _run(self) -> None:
        try:
            beat = before = time.monotonic()
            tick_s = min(1.0, self._times.heartbeat_s / 2)
            while not self._stopping.is_set():
                self._link.step(tick_s)
                now = time.monotonic()
                if now - before > 2 * tick_s:  # this process was stopped, or its Python code let no thread run
                    self._link.forgive_silence(now - before)
                before = now
                if now - beat >= self._times.heartbeat_s:
                    self._link.send_to_all("alive")
                    beat = now
                self._judge(now)
        except Exception:  # the training must not suffer
            _log.debug("the watch of the peers has ended", exc_info=True)
        finally:
            self._link.close()

    def _judge(self, now: float) -> None:
        if not self._own and self.reason is None:
            self.reason = self._link.failed
        if self.reason is None and not self._own:
            self._tell_of_silence(now)
            return
        if self._since is None:
            self._since = self._first_noticed = now
        if self._is_excused() and now - self._first_noticed < self._times.excuse_s:
            self._since = now
        if now - self._since > self._patience_s and not self._stopping.is_set():
            at = where_main_thread_waits()
            what = "This rank has failed" if self._own else f"Another rank has failed: {self.reason}"
            end_process(
                f"{what}\nRank {self._rank} has not ended within {self._patience_s:g} s and waits at {at}."
                " No exception reaches it there, so the process is ended."
            )

    def _tell_of_silence(self, now: float) -> None:
        for rank, connection in self._link.connections().items():
            silent_s = now - connection.heard
            is_told_here = isinstance(self._link, Hub) or self._rank == 1
            if silent_s > self._times.silence_s and rank not in self._told_silent and is_told_here:
                self._told_silent.add(rank)
                _log.warning(
                    "Rank %d has given no sign of life for %.0f s: its process or machine is stopped, it is cut off"
                    " from the network, or its Python code lets no other thread run. The run continues once it"
                    " answers; otherwise the time-out of the process group ends it.",
                    rank,
                    silent_s,
                )
