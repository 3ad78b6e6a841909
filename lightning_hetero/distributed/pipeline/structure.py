"""Flatten nested structures of tensors to send them, and rebuild them on the receiving side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["StageBoundary", "flatten", "unflatten"]


@dataclass(frozen=True)
class StageBoundary:
    """Describes the value that one stage sends to the next.

    Attributes:
        structure: The value, with each tensor replaced by its number.
        shapes: Shape of each tensor.
        dtypes: Data type of each tensor.
        requires_grad: Whether a gradient comes back for each tensor.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    requires_grad: tuple[bool, ...]

    @classmethod
    def of(cls, value: Any) -> StageBoundary:
        """Return the description that is needed to receive values like ``value``."""
        tensors, structure = flatten(value)
        return cls(
            structure,
            tuple(tuple(t.shape) for t in tensors),
            tuple(t.dtype for t in tensors),
            tuple(t.requires_grad for t in tensors),
        )

    def examples(self) -> tuple[Tensor, ...]:
        """Return tensors like those that are sent, but without memory."""
        return tuple(
            torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)
            for shape, dtype, requires_grad in zip(self.shapes, self.dtypes, self.requires_grad, strict=True)
        )


@dataclass(frozen=True)
class _Number:
    """The position of a tensor in a flattened structure."""

    number: int


def flatten(value: Any) -> tuple[list[Tensor], Any]:
    """Return the tensors of a nested structure, and the structure with their numbers in place of them.

    Args:
        value: Tensors in tuples, lists and mappings; None, numbers and strings are part of the structure.

    Raises:
        UnsupportedFeatureError: If it holds an object of any other type.
    """
    tensors: list[Tensor] = []
    return tensors, _numbered(value, tensors)


def unflatten(tensors: Any, structure: Any) -> Any:
    """Return the nested structure that :func:`flatten` has taken apart."""
    if isinstance(structure, _Number):
        return tensors[structure.number]
    if isinstance(structure, Mapping):
        return {key: unflatten(tensors, entry) for key, entry in structure.items()}
    if isinstance(structure, list | tuple):
        return _rebuilt(structure, (unflatten(tensors, entry) for entry in structure))
    return structure


def _numbered(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Number(len(tensors) - 1)
    if isinstance(value, Mapping):
        return {key: _numbered(entry, tensors) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return _rebuilt(value, (_numbered(entry, tensors) for entry in value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedFeatureError(
        f"Layers of a pipeline must exchange tensors in tuples, lists and dicts, got a {type(value).__name__!r}."
        f" Return its tensors instead, or combine the two layers into one."
    )


def _rebuilt(like: Any, entries: Iterator[Any]) -> Any:
    return type(like)(*entries) if hasattr(like, "_fields") else type(like)(entries)
