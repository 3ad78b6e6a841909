"""Announce why a rank fails, so that its peers, whose communication breaks off, can report the reason."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from lightning_hetero.distributed.torch_private import default_store
from lightning_hetero.exceptions import HeteroError, RankFailedError

__all__ = ["announce", "announced", "failure_of_peers", "forget", "why_communication_failed"]

_KEY = "lightning_hetero/failure"
_SEEN = "lightning_hetero/seen"
# Words in the errors of gloo and NCCL; torch has no exception type for most of them.
_COMMUNICATION = re.compile(r"gloo|nccl|process ?group|connection (closed|reset|refused)|timed out", re.IGNORECASE)
# Peers that are alive notice the same failure at about the same time.
_PATIENCE_S = 5.0


def announce(message: str) -> None:
    """Leave ``message`` for the peers; never raises."""
    with suppress(Exception):
        store = default_store()
        if store is not None:
            store.set(_KEY, message)


def announced() -> str | None:
    """Return the message of a failing rank; None if there is none, or if the rank that keeps the store is gone."""
    with suppress(Exception):
        store = default_store()
        if store is not None and store.check([_KEY]):
            return str(store.get(_KEY).decode())
    return None


def forget() -> None:
    """Delete the entries of an earlier run of these processes; never raises."""
    with suppress(Exception):
        store = default_store()
        if store is not None:
            store.delete_key(_KEY)
            store.delete_key(f"{_SEEN}/{dist.get_rank()}")


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
        raise RankFailedError(f"Another rank has failed: {reason}") from error


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
    try:
        search.join(2 * _PATIENCE_S)
    finally:  # a signal may interrupt this, and a thread that is still inside the store would abort the process
        enough.set()
        search.join(1.0)
    reason = announced() if found else None  # it may have arrived late
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
        store.set(f"{_SEEN}/{dist.get_rank()}", "1")
        deadline = time.monotonic() + _PATIENCE_S
        while silent and time.monotonic() < deadline and not store.check([_KEY]) and not enough.wait(0.05):
            silent -= {rank for rank in silent if store.check([f"{_SEEN}/{rank}"])}
    return sorted(silent)
