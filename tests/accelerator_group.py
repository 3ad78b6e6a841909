"""The process group of the virtual accelerator: it records what passes it, as NCCL's group would have to carry it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerator import NAME, VirtualTensor, note_wait, values_of
from torch import Tensor

BACKEND = "virtual"

_C10D: Any = dist.distributed_c10d  # its names of options, and the forms of its methods, are not annotated as they are


@dataclass(frozen=True)
class Call:
    """A collective on the device's group.

    Attributes:
        name: Name of the method.
        elements: Number of elements of its tensors.
        dtype: Type of the elements.
        on_device: Whether all tensors are on the device, as those of NCCL must be.
        line: The innermost lines of this package or of Lightning that called it.
    """

    name: str
    elements: int
    dtype: str
    on_device: bool
    line: str


_calls: list[Call] | None = None


@contextmanager
def calls() -> Iterator[list[Call]]:
    """Collect the collectives of the device's group in this context."""
    global _calls  # noqa: PLW0603
    outer, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = outer


class _Done(dist.Work):
    """Work that is done, as the host sees it after it has put it into a stream."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(list(tensors))

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class VirtualGroup(_C10D.ProcessGroup):  # type: ignore[misc]
    """Runs collectives of virtual tensors in gloo, on their values."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def _run(self, name: str, result: Sequence[Tensor], *args: Any, opts: Any = None) -> dist.Work:
        tensors = [t for part in args for t in _flat(part)]
        if _calls is not None:
            _calls.append(
                Call(
                    name,
                    sum(t.numel() for t in tensors),
                    str(tensors[0].dtype) if tensors else "",
                    all(isinstance(t, VirtualTensor) for t in tensors),
                    _line(),
                )
            )
        given = [_values(part) for part in args]
        if opts is not None:
            given.append(opts)
        getattr(self._gloo, name)(*given).wait()
        return _Done(result)

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts or dist.AllreduceOptions()
        averages = opts.reduceOp == dist.ReduceOp.AVG
        if averages:  # NCCL averages integers, gloo does not
            opts.reduceOp = dist.ReduceOp.SUM
        work = self._run("allreduce", tensors, tensors, opts=opts)
        for values in _values(tensors) if averages else ():
            values.div_(self.size(), rounding_mode=None if values.is_floating_point() else "trunc")
        return work

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        return self._run("broadcast", tensors, tensors, opts=opts or dist.BroadcastOptions())

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        (parts,) = outputs
        if len({part.numel() for part in parts}) > 1:  # NCCL takes parts of unequal size, gloo does not
            for root, part in enumerate(parts):
                options = dist.BroadcastOptions()
                options.rootRank = root
                self._run("broadcast", [part], [part], opts=options)
            return _Done(parts)
        return self._run("allgather", _flat(outputs), outputs, inputs, opts=opts or _C10D.AllgatherOptions())

    def _allgather_base(self, output: Any, given: Any, opts: Any = None) -> Any:
        return self._run("_allgather_base", [output], output, given, opts=opts or _C10D.AllgatherOptions())

    def reduce(self, tensors: Any, opts: Any) -> Any:
        return self._run("reduce", tensors, tensors, opts=opts)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for root, part in enumerate(inputs[0]):
            options = dist.ReduceOptions()
            options.rootRank = root
            self._run("reduce", [part], [part], opts=options)
        values_of(outputs[0]).copy_(values_of(inputs[0][self.rank()]))
        return _Done(outputs)

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        return self._run("gather", _flat(outputs), outputs, inputs, opts=opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> Any:
        return self._run("scatter", outputs, outputs, inputs, opts=opts)

    def barrier(self, opts: Any = None) -> Any:
        note_wait("barrier")
        return self._run("barrier", [], opts=opts or dist.BarrierOptions())

    def send(self, tensors: Any, target: int, tag: int) -> Any:
        return self._exchange("send", tensors, target, tag)

    def recv(self, tensors: Any, source: int, tag: int) -> Any:
        return self._exchange("recv", tensors, source, tag)

    def _exchange(self, name: str, tensors: Any, peer: int, tag: int) -> Any:
        if _calls is not None:
            on_device = all(isinstance(t, VirtualTensor) for t in tensors)
            _calls.append(Call(name, sum(t.numel() for t in tensors), str(tensors[0].dtype), on_device, _line()))
        return getattr(self._gloo, name)(_values(tensors), peer, tag)


def _flat(part: Any) -> list[Tensor]:
    return [part] if isinstance(part, Tensor) else [t for p in part for t in _flat(p)]


def _values(part: Any) -> Any:
    return values_of(part) if isinstance(part, Tensor) else [_values(p) for p in part]


def _line() -> str:
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return " < ".join(f"{f.filename.split('/')[-1]}:{f.lineno}" for f in frames[:-5:-1])


dist.Backend.register_backend(BACKEND, VirtualGroup, devices=[NAME])
