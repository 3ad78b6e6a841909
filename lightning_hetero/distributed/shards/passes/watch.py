"""Notice that ranks are in different passes without exchanging anything in an ordinary step.

A small thread per rank leaves in the common store where its rank is, once per second, and looks at another rank.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import uuid
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist

from lightning_hetero.distributed.group.failure import announced
from lightning_hetero.distributed.shards.passes.places import Place, why_different, why_stuck
from lightning_hetero.distributed.torch_private import default_store
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["PassWatch"]

_log = logging.getLogger(__name__)

_KEPT = 1024  # passes; ranks are never further apart than a few
_LOOK = timedelta(seconds=1)
_OWN_FILES = (dist.distributed_c10d.__file__, __file__)
_INNERMOST = 8  # frames of the main thread


class PassWatch:
    """The watch of one rank, from its construction to :meth:`stop`.

    Args:
        group: The ranks, on their hosts; every rank must construct its watch at the same point.
        fail: Function that tells the peers why this rank fails.

    Attributes:
        reason: Why the ranks cannot go on; None if nothing is known.
        tick_s: Seconds between two looks at the others.
        stuck_ticks: After how many looks ranks that wait, all of them and at different points, do so for ever.
    """

    tick_s: ClassVar = 1.0
    stuck_ticks: ClassVar = 45  # a slow link may take long for the last gradients of one rank

    def __init__(self, group: dist.ProcessGroup, fail: Callable[[str], None]) -> None:
        self.reason: str | None = None
        self._fail = fail
        self._rank, self._size = group.rank(), group.size()
        self._places: list[tuple[int, Place] | None] = [None] * _KEPT
        self._latest = (0, Place.of("end", 0, 0))
        self._still = (0, 0)  # how often it was seen to wait, and in which pass
        # a key of its own: an earlier training in the same processes may have left its places in the store
        token = torch.tensor(uuid.uuid4().int >> 66)
        dist.broadcast(token, 0, group)
        self._key = f"lightning_hetero/passes/{int(token)}"
        self._trains = threading.get_ident()
        self._stopping = threading.Event()
        # the thread must not keep the watch alive, and not be inside the store when the interpreter ends
        thread = threading.Thread(target=_run, args=(weakref.ref(self), self._stopping, self.tick_s), daemon=True)
        self.stop = weakref.finalize(self, _stop, self._stopping, thread)
        if self._size > 1:
            thread.start()

    def note(self, place: Place) -> None:
        """Note that this rank begins a pass."""
        count = self._latest[0] + 1
        self._places[count % _KEPT] = self._latest = (count, place)

    def check(self) -> None:
        """Raise an error if the ranks cannot go on.

        Raises:
            UnsupportedFeatureError: They are in different passes.
        """
        if self.reason is not None:
            self.refuse(self.reason)

    def refuse(self, reason: str) -> NoReturn:
        """Raise an error, and let everything that is waited for later raise it too.

        Raises:
            UnsupportedFeatureError: Always.
        """
        if self.reason is None:
            self.reason = reason
            self._fail(reason)
        raise UnsupportedFeatureError(f"`hetero_fsdp`: {reason}.")

    def wait(self, work: Any) -> None:
        """Wait for a collective of hosts, as long as the ranks can go on."""
        while not self._is_done(work):
            self.check()

    def _is_done(self, work: Any) -> bool:
        try:
            work.wait(_LOOK)
        except RuntimeError:
            self.check()
            if work.is_completed() or announced() is not None:  # it has failed itself, or a peer has
                raise
            return False
        return True

    def look(self) -> None:
        """Tell where this rank is, and compare that with another rank."""
        store = default_store()
        if store is None or self.reason is not None:
            return
        count, place = self._latest
        seen, when = self._still
        self._still = (seen + 1 if when == count and self._waits() else 0, count)
        store.set(f"{self._key}/{self._rank}", json.dumps([self._still[0], count, *place]))
        if self._still[0] >= self.stuck_ticks:
            self._compare_waiting([self._read(store, rank) for rank in range(self._size)])
        # If any two ranks differ, so do two neighbours.
        rank = (self._rank - 1) % self._size
        other = self._read(store, rank)
        own = self._places[other[1] % _KEPT] if other is not None else None
        if other is not None and own is not None and own[0] == other[1] and own[1] != other[2]:
            self._found(why_different({self._rank: own[1], rank: other[2]}))

    def _read(self, store: Any, rank: int) -> tuple[int, int, Place] | None:
        key = f"{self._key}/{rank}"
        if not store.check([key]):
            return None
        still, count, *place = json.loads(store.get(key).decode())
        return still, count, Place(*place)

    def _compare_waiting(self, rows: list[tuple[int, int, Place] | None]) -> None:
        known = {rank: row for rank, row in enumerate(rows) if row is not None and row[0] >= self.stuck_ticks}
        if len(known) < self._size:
            return
        most = max(count for _, count, _ in known.values())
        first = {rank: place for rank, (_, count, place) in known.items() if count == most}
        others = {rank: place for rank, (_, count, place) in known.items() if count < most}
        if others:
            self._found(why_stuck(first, others))

    def _waits(self) -> bool:
        """Return whether the thread that trains waits for other ranks in a collective."""
        frame = sys._current_frames().get(self._trains)
        for _ in range(_INNERMOST):
            if frame is None:
                break
            if frame.f_code.co_filename in _OWN_FILES:
                return True
            frame = frame.f_back
        return False

    def _found(self, reason: str) -> None:
        self.reason = reason
        self._fail(reason)


def _run(watch_ref: weakref.ref[PassWatch], stopping: threading.Event, tick_s: float) -> None:
    while not stopping.wait(tick_s):
        watch = watch_ref()
        if watch is None:
            return
        try:
            watch.look()
        except Exception:  # the training must not suffer
            _log.debug("where the ranks are could not be compared", exc_info=True)
        del watch


def _stop(stopping: threading.Event, thread: threading.Thread) -> None:
    stopping.set()
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join(2.0)
