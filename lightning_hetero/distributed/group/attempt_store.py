"""A store that holds nothing of ranks that have died, for ranks that torchrun has started again.

torchrun keeps one store over all restarts.  A rank that is back before a peer would read there where that peer was
listening before it died, and fail to connect (https://github.com/pytorch/pytorch/issues/135712); it would also read
what failed then.  torchrun's count of restarts does not tell attempts apart: each node counts for itself.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not exported

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["attempt_store", "may_be_stale"]

_KEY = "lightning_hetero/attempt"
_PAUSE_S = 0.02


def may_be_stale() -> bool:
    """Whether torchrun has given this process a store that earlier ranks may have written to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt_store(address: str, port: int, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Connect to torchrun's store and return a part of it that belongs to these ranks alone.

    Args:
        address: of the host that keeps the store.
        port: where it listens.
        rank: of this process.
        world_size: number of ranks; all of them have to call this.
        timeout: how long to wait for the others.

    Raises:
        TimeoutError: not all ranks have come in time; the message names those that have not, on rank 0.
    """
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    return PrefixStore(_attempt(store, rank, world_size, timeout.total_seconds()), store)


def _attempt(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a name of this attempt, the same on all ranks and never used before.

    Every other rank shows a number that it has just drawn, and believes rank 0 only if that answers this very number;
    rank 0 goes on answering until every rank has said, under the name of the attempt, that it has understood.
    """
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    if rank != 0:
        store.set(f"{_KEY}/shown/{rank}", mine)
        while True:
            shown, _, attempt = _read(store, f"{_KEY}/answer/{rank}").partition(" ")
            if shown == mine:
                store.set(f"{_KEY}/{attempt}/{rank}", "understood")
                return f"{_KEY}/{attempt}"
            _wait(deadline, "rank 0")
    answered: dict[int, str] = {}
    missing = set(range(1, world_size))
    while missing:
        for peer in missing:
            shown = _read(store, f"{_KEY}/shown/{peer}")
            if shown and shown != answered.get(peer):
                store.set(f"{_KEY}/answer/{peer}", f"{shown} {mine}")
                answered[peer] = shown
        missing = {peer for peer in missing if not store.check([f"{_KEY}/{mine}/{peer}"])}
        if missing:
            _wait(deadline, f"rank {', '.join(map(str, sorted(missing)))}")
    return f"{_KEY}/{mine}"


def _read(store: Store, key: str) -> str:
    return str(store.get(key).decode()) if store.check([key]) else ""


def _wait(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{whom} has not started in time; all ranks have to, before a process group can be made")
    time.sleep(_PAUSE_S)
