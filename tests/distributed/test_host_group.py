"""Hosts have a group of their own where the default group is not gloo's, and it ends with the default group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools, free_port
from recording_backend import NAME, recorded

from lightning_hetero.distributed.collectives import (
    all_gather,
    all_gather_counts,
    all_gather_numbers,
    all_wait,
    broadcast_flag,
    broadcast_from,
    decide_on_rank_zero,
    reduce_in_place,
)
from lightning_hetero.distributed.host_group import (
    close_host_group,
    gloo_is_used,
    group_of,
    has_own_group,
    host_group,
    host_timeout,
)


def start(backend: str, rank: int, bound: str) -> None:
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}",
        rank=rank,
        world_size=2,
    )
    assert dist.group.WORLD is not None
    dist.group.WORLD.bound_device_id = torch.device(bound)


def use_hosts(ports: tuple[int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rank = dist.get_rank()
    with recorded(ports) as record:
        start(NAME, rank, "xpu:0")  # to which torch would bind the new group as well
        group = host_group(timedelta(seconds=77))
        assert dist.group.WORLD is not None
        found["bound"] = str(dist.group.WORLD.bound_device_id), group.bound_device_id
        found["kept"] = host_group() is group and host_timeout() == timedelta(seconds=77)
        dist.group.WORLD.bound_device_id = None
        everyone = dist.new_group([0, 1])
        alone = [dist.new_group([0]), dist.new_group([1])][rank]
        found["of"] = group_of(None) is group and group_of(everyone) is group and group_of(alone) is alone
        record.calls.clear()
        found["exchanged"] = (
            all_gather({rank}),
            all_gather_counts(2**60 + rank),
            all_gather_numbers(0.1 + rank),
            broadcast_from(rank, 1),
            broadcast_flag(rank == 0),
            decide_on_rank_zero([rank], lambda rows: rows),
        )
        all_wait()
        found["through"] = {call.group for call in record.calls}
        found["of the device"] = [
            reduce_in_place(torch.tensor([1.0 + rank]), "mean").item(),
            reduce_in_place(torch.tensor([3 + rank]), "avg").item(),
            reduce_in_place(torch.tensor([3 + rank]), dist.ReduceOp.MAX).item(),
        ]
        found["waited"] = [call.name for call in record.calls if call.group == "device"]
        before = gloo_is_used(), has_own_group()
        dist.barrier()
        close_host_group()
        found["closed"] = [*before, dist.is_initialized(), has_own_group()]
        dist.destroy_process_group()
    found["default"] = host_group() is dist.group.WORLD, has_own_group(), gloo_is_used()
    return found


def test_hosts_exchange_through_a_group_of_their_own(ranks: RankPools) -> None:
    for found in ranks.run(2, use_hosts, (free_port(), free_port()), timeout_s=60):
        assert found["bound"] == ("xpu:0", None)
        assert found["kept"]
        assert found["of"]
        rows = [[0.0], [1.0]]
        assert found["exchanged"] == ([{0}, {1}], [2**60, 2**60 + 1], [0.1, 1.1], 1, True, rows)
        assert found["through"] == {"host"}
        assert found["of the device"] == [1.5, 3, 4]
        assert found["waited"] == ["allreduce"] * 3
        assert found["closed"] == [True, True, True, False]
        assert found["default"] == (True, False, True)


@pytest.mark.parametrize(
    ("config", "own"),
    [
        ("cpu:gloo,cuda:gloo", False),
        ("cpu:gloo,cuda:nccl", False),
        ("cuda:nccl", True),
        ("xpu:xccl", True),
        ("cpu:mpi,cuda:mpi", True),
        ("cpu:ucc,cuda:ucc", True),
    ],
)
def test_a_backend_that_has_gloo_on_hosts_needs_no_other(
    monkeypatch: pytest.MonkeyPatch, config: str, own: bool
) -> None:
    class Group:
        bound_device_id = None

    made, default = Group(), Group()
    monkeypatch.setattr(dist, "get_backend_config", lambda _: config)
    monkeypatch.setattr(dist, "new_group", lambda **_: made)
    monkeypatch.setattr(dist.group.__class__, "WORLD", property(lambda _: default))
    found: Any = host_group()
    assert found is (made if own else default)
