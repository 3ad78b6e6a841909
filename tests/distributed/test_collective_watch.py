"""Collectives are seen in the training's threads, and whatever waits in them is known as waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from harness import RankPools
from torch import Tensor

from lightning_hetero.distributed.collective_watch import Collective, CollectiveWatch


class SumsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        total = slopes[0].clone()
        dist.all_reduce(total)
        return total


_Group: Any = dist.ProcessGroup  # not annotated as it is called in Python


class OfALibrary(_Group):  # type: ignore[misc]
    """A group in Python, as libraries write them to survive failures."""

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        group: Any = dist.group.WORLD
        return group.allreduce(tensors, opts)


def in_another_thread(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def watched() -> tuple[list[tuple[str, int]], list[str]]:
    """Return the notices with the waits before them, and what began and ended while ranks waited."""
    notices: list[tuple[str, int]] = []
    waits: list[str] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        waits.append("begin")
        yield
        waits.append("end")

    watch = CollectiveWatch(waiting)

    def notice(collective: Collective) -> None:
        notices.append((collective.name, len(waits)))

    def backward() -> None:
        loss = SumsInBackward.apply(torch.ones(2, requires_grad=True)).sum()  # type: ignore[no-untyped-call]
        loss.backward()

    with watch.installed():
        dist.all_reduce(torch.ones(1))  # of nobody's batch, but the rank waits
        unwatched = len(waits)
        with watch.watching(notice):
            in_another_thread(lambda: dist.all_reduce(torch.ones(1)))  # of a data loader
            assert len(waits) == unwatched
            in_another_thread(backward)  # as torch does on devices
            backward()
            work = dist.all_reduce(torch.ones(1), async_op=True)
            assert work is not None
            before = len(waits)
            work.wait()
            assert len(waits) == before + 2
            noticed = len(notices)
            OfALibrary(dist.get_rank(), 2).allreduce([torch.ones(1)], dist.AllreduceOptions()).wait()
            assert len(notices) > noticed
            del notices[noticed:]
    before = len(waits)
    dist.all_reduce(torch.ones(1))
    assert len(waits) == before
    return notices, waits[:unwatched]


def test_the_threads_of_the_training_are_watched(ranks: RankPools) -> None:
    for notices, waits in ranks.run(2, watched):
        assert [name for name, _ in notices] == ["all_reduce"] * 3
        assert len({count for _, count in notices}) == 3
        assert waits[:2] == ["begin", "end"]
