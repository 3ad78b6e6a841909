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

__all__ = ["share"]

_Layout = tuple[tuple[int, ...], torch.dtype]


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


def _exchanged(
    own: Sequence[Tensor] | None, layouts: Sequence[_Layout], source: int, device: torch.device
) -> list[Tensor]:
    tensors: list[Any] = [None] * len(layouts)
    for dtype in sorted({dtype for _, dtype in layouts}, key=str):
        numbers = [i for i, layout in enumerate(layouts) if layout[1] == dtype]
        sizes = [torch.Size(layouts[i][0]).numel() for i in numbers]
        if own is None:
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
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
