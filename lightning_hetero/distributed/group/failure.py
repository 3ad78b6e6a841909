"""Say why a rank fails, so that its peers, whose communication breaks off, can say it too."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from lightning_hetero.exceptions import HeteroError, RankFailedError

__all__ = ["announce", "announced", "failure_of_peers", "forget", "why_communication_failed"]

_KEY = "lightning_hetero/failure"
_SEEN = "lightning_hetero/seen"
# What gloo and NCCL say; torch has no type of its own for most of it.
_COMMUNICATION = re.compile(r"gloo|nccl|process ?group|connection (closed|reset|refused)|timed out", re.IGNORECASE)
# Peers that are alive see the same failure at about the same time.
_PATIENCE_S = 5.0


def announce(message: str) -> None:
    """Leave ``message`` where the peers look for it; never raises."""
    with suppress(Exception):
        store = _store()
        if store is not None:
            store.set(_KEY, message)


def announced() -> str | None:
    """Return what a failing rank has left; None where nobody has, or where the rank that keeps it is gone."""
    with suppress(Exception):
        store = _store()
        if store is not None and store.check([_KEY]):
            return str(store.get(_KEY).decode())
    return None


def forget() -> None:
    """Take back what was announced and seen in an earlier run of these processes; never raises."""
    with suppress(Exception):
        store = _store()
        if store is not None:
            store.delete_key(_KEY)
            store.delete_key(f"{_SEEN}/{dist.get_rank()}")


@contextmanager
def failure_of_peers() -> Iterator[None]:
    """Replace what torch says when a peer is gone by what that peer has left, or by which peers do not answer.

    Raises:
        RankFailedError: something in this context failed after a peer had.
    """
    try:
        yield
    except RuntimeError as error:
        reason = None if isinstance(error, HeteroError) else announced() or why_communication_failed(error)
        if reason is None:
            raise
        raise RankFailedError(f"Another rank has failed: {reason}") from error


def why_communication_failed(error: BaseException) -> str | None:
    """Return which ranks do not answer; None where ``error`` is not of communication.

    Every rank that sees communication fail says so; those that do not are stopped, gone, or busy with something else.
    This takes some seconds, and no longer where the rank that keeps the answers is the one that does not answer.
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
    finally:  # a signal may cut this short, and a thread that is inside the store then would abort the process
        enough.set()
        search.join(1.0)
    reason = announced() if found else None  # it may have come late
    if reason is not None:
        return reason
    if not found:
        return "the rank that keeps the ranks' common store (rank 0, or torchrun on its node) does not answer"
    if not found[0]:
        return f"communication has broken off, although every rank answers; this rank says: {error}"
    ranks = ", ".join(map(str, found[0]))
    return (
        f"rank {ranks} does not answer (it is stopped, gone, cut off from the network, or at another point of the"
        f" program); this rank says: {error}"
    )


def _silent_ranks(enough: threading.Event) -> list[int]:
    silent = set(range(dist.get_world_size())) - {dist.get_rank()}
    with suppress(Exception):
        store = _store()
        store.set(f"{_SEEN}/{dist.get_rank()}", "1")
        deadline = time.monotonic() + _PATIENCE_S
        while silent and time.monotonic() < deadline and not store.check([_KEY]) and not enough.wait(0.05):
            silent -= {rank for rank in silent if store.check([f"{_SEEN}/{rank}"])}
    return sorted(silent)


def _store() -> Any:
    # the store by which the ranks found each other; nothing public returns it, and a collective cannot be used where a
    # rank is gone. tests/plugin/ddp/test_micro_batches.py fails where this changes.
    return dist.distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None
