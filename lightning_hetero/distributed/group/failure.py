"""Announce why a rank fails, so that its peers, whose communication breaks off, can report the reason.

The announcement lies in the ranks' common store, where a peer whose communication has failed looks for it.  Peers that
wait in a device call do not look; a thread of theirs is told (:mod:`~lightning_hetero.distributed.group.peer_watch`).

Several runs of the same processes use one store, and a slow rank may still leave one run while a fast rank is in the
next.  So each run has keys of its own, and none is ever deleted: a rank that has found a key and then reads it would
otherwise wait for it until the store's time-out.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from lightning_hetero.distributed.group.peer_links import Hub, Link, Spoke
from lightning_hetero.distributed.group.peer_watch import PeerWatch, WatchTimes
from lightning_hetero.distributed.torch_private import default_store
from lightning_hetero.exceptions import HeteroError, RankFailedError

__all__ = [
    "announce",
    "announced",
    "begin_run",
    "begin_teardown",
    "failure_of_peers",
    "finishing",
    "pass_on",
    "stop_watching",
    "watch_peers",
    "why_communication_failed",
]

_FAILURE, _WATCH, _SEEN = "failure", "watch", "seen"
# Words in the errors of gloo and NCCL; torch has no exception type for most of them.
_COMMUNICATION = re.compile(r"gloo|nccl|process ?group|connection (closed|reset|refused)|timed out", re.IGNORECASE)
# Peers that are alive notice the same failure at about the same time.
_PATIENCE_S = 5.0
_PREFIX = "Another rank has failed: "
_TIMES = WatchTimes()

_runs: list[None] = []  # an entry for each run of this process
_active: list[PeerWatch] = []  # at most one
_finishing: list[None] = []  # an entry for each piece of work that must not be cut off


def begin_run() -> None:
    """Forget what an earlier run of these processes has announced; every rank must call this once per run."""
    _runs.append(None)


def _key(what: str) -> str:
    return f"lightning_hetero/run_{len(_runs)}/{what}"


# ---- the watch -------------------------------------------------------------------------------------------------------


def watch_peers(host: str, is_excused: Callable[[], bool]) -> None:
    """Watch the peers until :func:`stop_watching`, also while the main thread waits in a device call.

    If a peer has failed or died and the main thread has not left by itself after some seconds, the process is ended.

    Args:
        host: Address at which this rank reaches the machine of rank 0.
        is_excused: Returns whether the main thread has noticed a failure and does what must be done before it leaves.
    """
    stop_watching()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    rank, place, failure = dist.get_rank(), _key(_WATCH), _key(_FAILURE)
    try:
        if rank == 0:
            link: Link = Hub(host, lambda address: default_store().set(place, address))
        else:
            link = Spoke(rank, host, lambda: _read(place), lambda: _read(failure))
    except (OSError, RuntimeError):  # no port to listen at, or no store: the ranks go on without it
        return
    _active.append(PeerWatch(link, rank, lambda: bool(_finishing) or is_excused(), _TIMES))


def stop_watching() -> None:
    """Leave the peers in good order."""
    while _active:
        _active.pop().stop()


def begin_teardown() -> None:
    """End the process if the tear-down of a run that has failed waits for the device."""
    for watch in _active:
        watch.begin_teardown()


@contextmanager
def finishing() -> Iterator[None]:
    """Do not end the process because of a failed peer while in this context, for example in a checkpoint."""
    _finishing.append(None)
    try:
        yield
    finally:
        _finishing.pop()


def pass_on(reason: str) -> None:
    """Tell the peers why another rank has failed, since they may wait where they do not notice."""
    for watch in _active:
        watch.tell(reason.removeprefix(_PREFIX))


def _read(key: str) -> str | None:
    with suppress(Exception):
        store = default_store()
        if store is not None and store.check([key]):
            return str(store.get(key).decode())
    return None


def _told() -> str | None:
    return next((watch.reason for watch in _active), None)


# ---- the store -------------------------------------------------------------------------------------------------------


def announce(message: str) -> None:
    """Leave ``message`` for the peers; never raises."""
    for watch in _active:
        watch.tell(message)
    with suppress(Exception):
        store = default_store()
        if store is not None:
            store.set(_key(_FAILURE), message)


def announced() -> str | None:
    """Return the message of a failing rank; None if there is none, or if the rank that keeps the store is gone."""
    return _told() or _read(_key(_FAILURE))


@contextmanager
def failure_of_peers() -> Iterator[None]:
    """Replace torch's error after a peer is gone by that peer's message, or by a list of ranks that do not answer.

    Raises:
        RankFailedError: If something in this context failed because a peer had failed before.
    """
    try:
        yield
    except RuntimeError as error:
        reason = None if isinstance(error, HeteroError) else announced() or why_communication_failed(error)
        if reason is None:
            raise
        raise RankFailedError(f"{_PREFIX}{reason}") from error


def why_communication_failed(error: BaseException) -> str | None:
    """Return a sentence that names the ranks that do not answer; None if ``error`` is not about communication.

    Every rank whose communication fails reports so in the store; those that do not are stopped, gone, or busy with
    something else. This takes some seconds, and no longer if the rank that keeps the store does not answer.
    """
    if isinstance(error, HeteroError) or not isinstance(error, RuntimeError) or not _COMMUNICATION.search(str(error)):
        return None
    if not dist.is_initialized():
        return None  # there are no peers yet
    found: list[list[int]] = []
    enough = threading.Event()
    search = threading.Thread(target=lambda: found.append(_silent_ranks(enough)), daemon=True)
    search.start()
    deadline = time.monotonic() + 2 * _PATIENCE_S
    try:
        with finishing():
            while search.is_alive() and time.monotonic() < deadline and _told() is None:
                search.join(0.1)
    finally:  # a signal may interrupt this, and a thread that is still inside the store would abort the process
        enough.set()
        search.join(1.0)
    reason = announced() if found else _told()  # it may have arrived late
    if reason is not None:
        return reason
    if not found:
        return "the process that keeps the ranks' common store (rank 0, or torchrun on its node) does not answer"
    if not found[0]:
        return f"communication has broken off although every rank answers; this rank's error: {error}"
    ranks = ", ".join(map(str, found[0]))
    return (
        f"rank {ranks} does not answer (it is stopped, gone, cut off from the network, or at another point of the"
        f" program); this rank's error: {error}"
    )


def _silent_ranks(enough: threading.Event) -> list[int]:
    silent = set(range(dist.get_world_size())) - {dist.get_rank()}
    with suppress(Exception):
        store = default_store()
        store.set(_key(f"{_SEEN}/{dist.get_rank()}"), "1")
        deadline = time.monotonic() + _PATIENCE_S
        while silent and time.monotonic() < deadline and not store.check([_key(_FAILURE)]) and not enough.wait(0.05):
            silent -= {rank for rank in silent if store.check([_key(f"{_SEEN}/{rank}")])}
    return sorted(silent)
