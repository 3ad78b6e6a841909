"""Give all ranks a value that one of them has computed, without a host that waits for its device."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.distributed.collectives import broadcast_from
from lightning_hetero.distributed.host_group import host_group
from lightning_hetero.distributed.pipeline.passes.channels import channel

__all__ = ["receive", "send", "share"]

_Layout = tuple[tuple[int, ...], torch.dtype]

_TAG = 4  # of messages between hosts, other than those of micro-batches and of copies


def share(value: Any, source: int, device: torch.device) -> Any:
    """Return the value of rank ``source`` on every rank; every rank must call this at the same point.

    Tensors of the device pass between the devices, in one message for each of their types, and everything else between
    the hosts.

    Args:
        value: A picklable value; used on rank ``source`` only.
        source: The rank whose value counts.
        device: Device of this rank.

    Returns:
        On rank ``source``, the value itself; elsewhere a copy, with tensors without gradients.
    """
    if device.type == "cpu":
        return broadcast_from(value, source)
    is_source = dist.get_rank() == source
    packed = _taken_apart(value, device) if is_source else (b"", [])
    layouts, description = broadcast_from(([_layout(tensor) for tensor in packed[1]], packed[0]), source)
    tensors = _exchanged(packed[1] if is_source else None, layouts, source, device)
    return value if is_source else _Unpickler(description, tensors).load()


def send(value: Any, target: int, device: torch.device) -> None:
    """Send a picklable value to one rank, which must call :func:`receive`.

    Tensors of the device pass through the channel between the two ranks, which must be open.

    Raises:
        Exception: If the value cannot be pickled; nothing is sent then.
    """
    description, tensors = _taken_apart(value, device)
    layouts = [_layout(tensor) for tensor in tensors]
    packed = torch.frombuffer(bytearray(pickle.dumps((layouts, description))), dtype=torch.uint8)
    dist.send(torch.tensor([packed.numel()]), target, group=host_group(), tag=_TAG)
    dist.send(packed, target, group=host_group(), tag=_TAG)
    for numbers in _of_one_type(layouts):
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in numbers])
        if len(flat):
            dist.send(_as_numbers(flat), target, group=channel(dist.get_rank(), target))


def receive(source: int, device: torch.device) -> Any:
    """Return the value that another rank sends to this one, with tensors without gradients."""
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, source, group=host_group(), tag=_TAG)
    packed = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(packed, source, group=host_group(), tag=_TAG)
    layouts, description = pickle.loads(packed.numpy().tobytes())
    tensors: list[Any] = [None] * len(layouts)
    for numbers in _of_one_type(layouts):
        sizes = [torch.Size(layouts[i][0]).numel() for i in numbers]
        flat = torch.empty(sum(sizes), dtype=layouts[numbers[0]][1], device=device)
        if len(flat):
            dist.recv(_as_numbers(flat), source, group=channel(source, dist.get_rank()))
        for i, part in zip(numbers, flat.split(sizes), strict=True):
            tensors[i] = part.view(layouts[i][0])
    return _Unpickler(description, tensors).load()


def _of_one_type(layouts: Sequence[_Layout]) -> list[list[int]]:
    """Return the numbers of the tensors of each type, in the same order on all ranks."""
    types = sorted({dtype for _, dtype in layouts}, key=str)
    return [[i for i, (_, dtype) in enumerate(layouts) if dtype == wanted] for wanted in types]


def _exchanged(
    own: Sequence[Tensor] | None, layouts: Sequence[_Layout], source: int, device: torch.device
) -> list[Tensor]:
    tensors: list[Any] = [None] * len(layouts)
    for numbers in _of_one_type(layouts):
        sizes = [torch.Size(layouts[i][0]).numel() for i in numbers]
        if own is None:
            flat = torch.empty(sum(sizes), dtype=layouts[numbers[0]][1], device=device)
        else:
            flat = torch.cat([own[i].detach().reshape(-1) for i in numbers])
        if len(flat):
            dist.broadcast(_as_numbers(flat), src=source)
        for i, part in zip(numbers, flat.split(sizes), strict=True):
            tensors[i] = part.view(layouts[i][0])
    return tensors


def _as_numbers(flat: Tensor) -> Tensor:
    # not every backend has a type for truth values
    return flat.view(torch.uint8) if flat.dtype == torch.bool else flat


def _layout(tensor: Tensor) -> _Layout:
    return tuple(tensor.shape), tensor.dtype


def _taken_apart(value: Any, device: torch.device) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file, device)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


class _Pickler(pickle.Pickler):
    """Replaces tensors of the device by numbers.

    Attributes:
        tensors: The tensors in the order of their numbers.
    """

    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._device = device
        self._plain = type(torch.empty(0, device=device))
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not self._plain or obj.device != self._device or _is_more_than_values(obj):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[id(obj)]

    def reducer_override(self, obj: Any) -> Any:
        # otherwise it would arrive on the device of this rank
        return obj.cpu().__reduce_ex__(4) if isinstance(obj, Tensor) and obj.device.type != "cpu" else NotImplemented


def _is_more_than_values(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested


class _Unpickler(pickle.Unpickler):
    def __init__(self, description: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(io.BytesIO(description))
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
