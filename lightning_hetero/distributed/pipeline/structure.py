"""Flatten nested structures of tensors to send them, and rebuild them on the receiving side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Call", "Description", "flatten", "mapped", "tensors_of", "unflatten"]


@dataclass(frozen=True)
class Call:
    """The arguments with which a step calls the model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """Describes the value that one stage sends to the next for a micro-batch.

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
    def of(cls, tensors: list[Tensor], structure: Any) -> Description:
        """Return the description of what :func:`flatten` has returned."""
        return cls(
            structure,
            tuple(tuple(t.shape) for t in tensors),
            tuple(t.dtype for t in tensors),
            tuple(t.requires_grad for t in tensors),
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

    def numbered(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            return _Number(len(tensors) - 1)
        if leaf is None or isinstance(leaf, bool | int | float | str):
            return leaf
        raise UnsupportedFeatureError(
            f"Layers of a pipeline must exchange tensors in tuples, lists and dicts, got a {type(leaf).__name__!r}."
            f" Return its tensors instead, or combine the two layers into one."
        )

    return tensors, mapped(value, numbered)


def unflatten(tensors: Any, structure: Any) -> Any:
    """Return the nested structure that :func:`flatten` has taken apart."""
    return mapped(structure, lambda leaf: tensors[leaf.number] if isinstance(leaf, _Number) else leaf)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a nested structure with every leaf replaced by what ``change`` returns for it."""
    if isinstance(value, Mapping):
        entries = {key: mapped(entry, change) for key, entry in value.items()}
        return entries if type(value) is dict else _mapping_like(value, entries)
    if isinstance(value, list | tuple):
        return _rebuilt(value, (mapped(entry, change) for entry in value))
    return change(value)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a nested structure, whatever else it holds."""
    found: list[Tensor] = []
    mapped(value, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def _mapping_like(like: Any, entries: dict[Any, Any]) -> Any:
    try:  # the outputs of models of transformers are dataclasses that are mappings
        return type(like)(**entries)
    except TypeError:
        return entries


def _rebuilt(like: Any, entries: Iterator[Any]) -> Any:
    return type(like)(*entries) if hasattr(like, "_fields") else type(like)(entries)
