"""What a rank announces reaches its peers in the same run, and in no other run of the same processes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
from harness import RankPools

from lightning_hetero.distributed.group import failure
from lightning_hetero.distributed.group.failure import announce, announced, begin_run
from lightning_hetero.distributed.torch_private import default_store


class Slow:
    """The ranks' store; between the two parts of a read, the peers begin their next run."""

    def __init__(self) -> None:
        self.store = default_store()

    def check(self, keys: list[str]) -> bool:
        found = self.store.check(keys)
        dist.barrier()  # rank 0 goes on
        dist.barrier()  # and has begun its next run
        return bool(found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def runs_that_overlap() -> dict[str, Any]:
    """Rank 0 is always ahead: it begins a run while rank 1 is still in the one before."""
    is_fast, store, heard = dist.get_rank() == 0, default_store(), {}
    before = store.timeout
    store.set_timeout(timedelta(seconds=20))  # a read that waits for a key must not wait for half an hour

    begin_run()
    announce("first") if is_fast else None
    dist.barrier()
    heard["in the same run"] = announced()
    dist.barrier()

    if is_fast:
        begin_run()
    dist.barrier()
    if not is_fast:
        announce("late")
        begin_run()
    dist.barrier()
    heard["after a slow rank has announced"] = announced()
    dist.barrier()

    announce("third") if is_fast else None
    dist.barrier()
    if is_fast:
        dist.barrier()
        begin_run()
        dist.barrier()
    else:
        with mock.patch.object(failure, "default_store", Slow):
            heard["while the peers begin a run"] = announced()
        begin_run()
    dist.barrier()
    store.set_timeout(before)
    return heard


def test_an_announcement_belongs_to_one_run(ranks: RankPools) -> None:
    fast, slow = ranks.run(2, runs_that_overlap, timeout_s=60.0)
    assert fast["in the same run"] == slow["in the same run"] == "first"
    assert fast["after a slow rank has announced"] is None
    assert slow["after a slow rank has announced"] is None
    assert slow["while the peers begin a run"] == "third"
