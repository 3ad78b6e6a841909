"""A backend over gloo that plays the devices' own, and a record of what passes through it and through other groups."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.distributed.torch_private import collective_methods

NAME = "recorded"


@dataclass(frozen=True)
class Call:
    """A call that communicates.

    Attributes:
        phase: When it was made.
        group: "device" for the group of the recorded backend, "host" for others.
        name: Name of the method of the process group.
        bytes: Size of this rank's tensors.
        of_bytes: Whether it moves bytes, as objects do.
        in_main_thread: Whether the training's own thread has made it.
    """

    phase: str
    group: str
    name: str
    bytes: int
    of_bytes: bool
    in_main_thread: bool


class Record:
    """The calls of this process.

    Attributes:
        phase: What the next calls belong to.
        calls: The calls so far.
    """

    def __init__(self) -> None:
        self.phase = ""
        self.calls: list[Call] = []

    def add(self, group: str, name: str, given: Any) -> None:
        tensors = [*_tensors_in(given)]
        self.calls.append(
            Call(
                self.phase,
                group,
                name,
                sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                any(tensor.dtype == torch.uint8 for tensor in tensors),
                threading.current_thread() is threading.main_thread(),
            )
        )


_record = Record()


class RecordedGroup(dist.ProcessGroup):
    """A group whose calls are recorded, also those that DDP makes in C++."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: timedelta) -> None:
        super().__init__(rank, world_size)  # type: ignore[call-arg]  # as torch's own Python groups
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, world_size, timeout)

    def getBackendName(self) -> str:  # noqa: N802  # of torch
        return NAME

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]  # as C++ calls it
        tensors = tensors if isinstance(tensors, list) else [tensors]
        _record.add("device", "allreduce", tensors)
        opts = opts or dist.AllreduceOptions()
        averages = opts.reduceOp == dist.ReduceOp.AVG
        if averages:  # which gloo does not know
            opts.reduceOp = dist.ReduceOp.SUM
        work = self._gloo.allreduce(tensors, opts)
        if averages:
            work.wait()
            for tensor in tensors:
                tensor.div_(self.size())
        return work


def _forwarding(name: str) -> Callable[..., Any]:
    def call(self: RecordedGroup, *args: Any, **kwargs: Any) -> Any:
        _record.add("device", name, args)
        return getattr(self._gloo, name)(*args, *kwargs.values())

    return call


for _name in ("broadcast", "allgather", "gather", "scatter", "reduce", "reduce_scatter", "send", "recv", "barrier"):
    setattr(RecordedGroup, _name, _forwarding(_name))


@contextmanager
def recorded(ports: tuple[int, int]) -> Iterator[Record]:
    """Let a Trainer start a group of the recorded backend in this context, and record what every group does.

    Args:
        ports: Ports on which the groups of this context and of the time after it find each other.
    """
    import os

    global _record  # noqa: PLW0603  # of this process
    _record = Record()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    before = os.environ["MASTER_PORT"]
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, RecordedGroup, devices=["cpu"])
    dist.barrier()  # a peer may still be connecting
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(ports[0])
    try:
        with _others_recorded(_record):
            yield _record
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ["MASTER_PORT"] = before
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{ports[1]}", rank=rank, world_size=world_size)


@contextmanager
def _others_recorded(record: Record) -> Iterator[None]:
    methods = {name: vars(dist.ProcessGroup)[name] for name in collective_methods()}

    def recording(name: str, method: Any) -> Any:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, RecordedGroup):
                record.add("host", name, (args, kwargs))
            return method(self, *args, **kwargs)

        return call

    for name in methods:
        setattr(dist.ProcessGroup, name, recording(name, getattr(dist.ProcessGroup, name)))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(dist.ProcessGroup, name, method)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors_in(entry)


__all__ = ["NAME", "Call", "Record", "RecordedGroup", "recorded"]
