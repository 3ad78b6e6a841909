"""Give restarted ranks a store without entries from ranks that have died.

torchrun keeps one store over all restarts.  A rank that restarts before a peer would read the address at which that
peer listened before it died, and fail to connect (https://github.com/pytorch/pytorch/issues/135712); it would also read
the failure of that time.  torchrun's count of restarts does not distinguish attempts: each node counts for itself.

NCCL's watchdogs use the whole store, whatever part of it their group has.  What those of an earlier attempt have left
there would make those of this one end their processes.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not exported

__all__ = ["attempt_store", "may_be_stale"]

_KEY = "lightning_hetero/attempt"
_PAUSE_S = 0.02
# kStoreDumpKey and kStoreErrorSignalKey in torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp
_KEYS_OF_NCCL = ("exception_dump", "remote_error")


def may_be_stale() -> bool:
    """Return whether torchrun has given this process a store that earlier ranks may have written to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt_store(address: str, port: int, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Connect to torchrun's store and return a part of it that belongs to these ranks alone.

    Args:
        address: Address of the host that keeps the store.
        port: Port at which the store listens.
        rank: Rank of this process.
        world_size: Number of ranks; all of them must call this.
        timeout: How long to wait for the other ranks.

    Raises:
        TimeoutError: If not all ranks have called in time; on rank 0 the message names those that have not.
    """
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    if rank == 0:  # without whose answer no rank begins
        for key in _KEYS_OF_NCCL:
            store.delete_key(key)
    return PrefixStore(_attempt(store, rank, world_size, timeout.total_seconds()), store)


def _attempt(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a name of this attempt, the same on all ranks and never used before.

    Every other rank shows a random identifier, and accepts the answer of rank 0 only if it repeats that identifier.
    Rank 0 keeps answering until every rank has confirmed under the name of the attempt.
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
        raise TimeoutError(f"{whom} has not started in time; a process group needs all ranks")
    time.sleep(_PAUSE_S)
