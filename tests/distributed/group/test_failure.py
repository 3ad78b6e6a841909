"""What a rank announces reaches its peers in the same run, and in no other run of the same processes."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
from harness import RankPools

from lightning_hetero.distributed.group import failure
from lightning_hetero.distributed.group.failure import announce, announced, begin_run
from lightning_hetero.distributed.torch_private import default_store

LOST = RuntimeError("gloo: timed out after 3 s")


class Stuck:
    """The ranks' store, whose keeper does not answer for a while."""

    def set(self, *_: Any) -> None:
        time.sleep(3.0)
        raise RuntimeError("closed")


def reasons() -> dict[str, Any]:
    """Let communication fail on rank 0 alone, on both, with a store that does not answer, and by another error."""
    found: dict[str, Any] = {}
    begin_run()
    with mock.patch.object(failure, "_PATIENCE_S", 0.3):
        found["alone"] = None if dist.get_rank() else failure.why_communication_failed(LOST)
        dist.barrier()
        begin_run()
        found["both"] = failure.why_communication_failed(LOST)
        with mock.patch.object(failure, "default_store", Stuck):
            found["no store"] = failure.why_communication_failed(LOST)
    found["another error"] = failure.why_communication_failed(RuntimeError("index out of range"))
    found["no error of torch's"] = failure.why_communication_failed(OSError("gloo"))
    dist.barrier()
    begin_run()
    return found


def test_a_rank_says_who_does_not_answer(ranks: RankPools) -> None:
    first, second = ranks.run(2, reasons, timeout_s=60.0)
    assert first["alone"].startswith("rank 1 does not answer (it is stopped, gone, cut off from the network, or at")
    assert first["alone"].endswith("this rank's error: gloo: timed out after 3 s")
    for found in (first, second):
        assert found["both"].startswith("communication has broken off although every rank answers")
        assert found["no store"].startswith("the process that keeps the ranks' common store")
        assert found["another error"] is None
        assert found["no error of torch's"] is None


def test_before_there_are_peers_nobody_is_blamed() -> None:
    assert failure.why_communication_failed(LOST) is None


def watch_without_a_port() -> tuple[int, int]:
    unreachable = OSError("no port is free")
    with (
        mock.patch.object(failure, "Hub", side_effect=unreachable),
        mock.patch.object(failure, "Spoke", side_effect=unreachable),
    ):
        failure.watch_peers("127.0.0.1", lambda: False)
        before = len(failure._active)
    return before, len(failure._active)


def test_ranks_that_cannot_watch_each_other_train_all_the_same(ranks: RankPools) -> None:
    assert ranks.run(2, watch_without_a_port) == [(0, 0)] * 2


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
