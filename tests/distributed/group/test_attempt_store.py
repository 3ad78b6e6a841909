"""Ranks that were started again find one another in a store that still holds what died with the earlier ones."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not exported

from lightning_hetero.distributed.group.attempt_store import attempt_store

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

HOST = "127.0.0.1"


@pytest.fixture
def port() -> Iterator[int]:
    server = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    yield server.port
    del server


def join(port: int, rank: int, world_size: int, delay_s: float = 0.0, timeout_s: float = 30.0) -> Store:
    time.sleep(delay_s)
    return attempt_store(HOST, port, rank, world_size, timedelta(seconds=timeout_s))


@pytest.mark.timeout(120)
def test_every_attempt_has_a_store_of_its_own_whoever_comes_first(port: int) -> None:
    """Ranks of an attempt meet, in any order, and see nothing of the attempts before; the world may change between."""
    draw = random.Random(1)
    with ThreadPoolExecutor(4) as pool:
        for attempt in range(12):
            world_size = draw.choice([1, 2, 3, 4])
            stores = [pool.submit(join, port, rank, world_size, 0.1 * draw.random()) for rank in range(world_size)]
            joined = [store.result(60) for store in stores]
            assert not any(store.check(["where"]) for store in joined)
            joined[draw.randrange(world_size)].set("where", str(attempt))
            assert [store.get("where") for store in joined] == [str(attempt).encode()] * world_size


@pytest.mark.timeout(120)
def test_a_rank_that_died_before_it_was_understood_is_forgotten(port: int) -> None:
    """Rank 1 shows its number and dies; the rank 1 that follows is met by the same rank 0."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(join, port, 0, 3)
        with pytest.raises(TimeoutError, match="rank 0 has not started in time"):
            # as if it was another store's: nobody answers on a rank that rank 0 does not know
            join(port, 7, 8, timeout_s=0.3)
        TCPStore(HOST, port, is_master=False).set("lightning_hetero/attempt/shown/1", "of a dead rank")
        time.sleep(0.2)
        second, third = pool.submit(join, port, 1, 3), join(port, 2, 3)
        third.set("where", "here")
        assert [store.result(60).get("where") for store in (first, second)] == [b"here"] * 2


@pytest.mark.timeout(60)
def test_failures_that_nccl_has_left_are_forgotten(port: int) -> None:
    """NCCL looks in the store that underlies the part of an attempt."""
    root, keys = TCPStore(HOST, port, is_master=False), ("exception_dump", "remote_error")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):  # with traces and without
            second = pool.submit(join, port, 1, 2)
            stores = [join(port, 0, 2, 0.1), second.result(60)]
            assert not any(store.check([key]) for store in (root, *stores) for key in keys)
            for key in keys:
                root.set(key, "1")
        assert all(root.check([key]) for key in keys)


@pytest.mark.timeout(60)
def test_ranks_that_do_not_come_are_named(port: int) -> None:
    with pytest.raises(TimeoutError, match=r"rank 1, 2 has not started in time"):
        join(port, 0, 3, timeout_s=0.5)
