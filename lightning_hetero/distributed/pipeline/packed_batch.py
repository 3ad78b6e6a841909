"""Take a batch apart into the bytes of its tensors and a description of everything else.

The description of a batch seldom differs from that of the batch before, so it need not be sent again.  It is a pickle
in which plain tensors are numbers; other objects, and tensors that are more than their values, are pickled as they are.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PackedBatch", "empty_tensors", "packed", "unpacked"]


@dataclass(frozen=True)
class _Layout:
    """What a rank must know to receive the bytes of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    pinned: bool

    def empty(self) -> Tensor:
        pinned = self.pinned and torch.cuda.is_available()
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="cpu", pin_memory=pinned)


@dataclass(frozen=True)
class PackedBatch:
    """A batch that can be sent.

    Attributes:
        description: Everything but the values of plain tensors, which it refers to by number.
        contents: The bytes of each plain tensor, without copies where that is possible.
    """

    description: bytes
    contents: list[Tensor]


def packed(batch: Any) -> PackedBatch:
    """Take a batch apart.

    Raises:
        Exception: The batch cannot be pickled, for example because it holds a generator.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(batch)
    dense = [_dense(tensor) for tensor in pickler.tensors]
    layouts = [_Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_pinned()) for tensor in dense]
    return PackedBatch(pickle.dumps((layouts, file.getvalue())), [_bytes_of(tensor) for tensor in dense])


def empty_tensors(description: bytes) -> tuple[list[Tensor], list[Tensor]]:
    """Return new tensors for the values of a batch, and the bytes of each, to be received."""
    layouts, _ = pickle.loads(description)  # of another rank of this training
    tensors = [layout.empty() for layout in layouts]
    return tensors, [_bytes_of(tensor) for tensor in tensors]


def unpacked(description: bytes, tensors: Sequence[Tensor]) -> Any:
    """Return a new batch that is described so, with these tensors."""
    _, pickled = pickle.loads(description)  # of another rank of this training
    return _Unpickler(pickled, tensors).load()


class _Pickler(pickle.Pickler):
    """Replaces plain tensors by numbers.

    Attributes:
        tensors: The tensors in the order of their numbers.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def reducer_override(self, obj: Any) -> Any:  # an object that comes twice is pickled once
        if not _is_plain(obj):
            return NotImplemented
        self.tensors.append(obj)
        return _tensor_of, (len(self.tensors) - 1,)


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._tensors = tensors

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (_tensor_of.__module__, _tensor_of.__name__):
            return self._tensors.__getitem__
        return super().find_class(module, name)


def _tensor_of(number: int) -> Tensor:
    """Stand for a tensor in a pickle, which only :class:`_Unpickler` can read."""
    raise pickle.UnpicklingError(f"tensor {number} is not in the pickle")


def _is_plain(value: Any) -> bool:
    """Return whether a tensor is nothing but its values, shape, strides and type."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and not (
            value.requires_grad
            or value.is_quantized
            or value.is_nested
            or value.is_meta
            or any(getattr(value, "names", ()))
        )
        and not vars(value)
    )


def _dense(tensor: Tensor) -> Tensor:
    """Return a tensor on the host whose values lie side by side; ``tensor`` itself if it is one."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    strides = torch.empty_like(tensor, device="meta").stride()  # those of a copy that keeps the order in memory
    return tensor if tensor.stride() == strides else tensor.clone()


def _bytes_of(dense: Tensor) -> Tensor:
    size = dense.element_size()
    view = torch.empty(0, dtype=torch.uint8, device="cpu")
    return view.set_(dense.untyped_storage(), dense.storage_offset() * size, (dense.numel() * size,), (1,))
