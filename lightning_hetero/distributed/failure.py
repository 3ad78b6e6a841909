"""Say why a rank fails, so that its peers, whose communication breaks off, can say it too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from lightning_hetero.exceptions import HeteroError, RankFailedError

__all__ = ["announce", "announced", "failure_of_peers"]

_KEY = "lightning_hetero/failure"


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


@contextmanager
def failure_of_peers() -> Iterator[None]:
    """Replace what torch says when a peer is gone by what that peer has left.

    Raises:
        RankFailedError: something in this context failed after a peer had.
    """
    try:
        yield
    except RuntimeError as error:
        message = None if isinstance(error, HeteroError) else announced()
        if message is None:
            raise
        raise RankFailedError(f"Another rank has failed: {message}") from error


def _store() -> Any:
    # the store by which the ranks found each other; nothing public returns it, and a collective cannot be used where a
    # rank is gone. tests/plugin/test_passes.py fails where this changes.
    return dist.distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None
