"""Notice data that the user has divided by rank, where every rank is to work on the same data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from lightning_hetero.distributed.collectives import all_gather

__all__ = ["what_divides"]

_DEEPEST = 4
_LARGEST = 1_000_000  # entries of a list that are compared
_INSIDE = ("sampler", "batch_sampler", "batches", "dataset", "datasets", "data_source", "datapipe", "iterable")


def what_divides(loader: Any) -> str | None:
    """Return the name of the class that divides the data of a loader by rank, or None.

    An object divides data if it holds the number of its rank together with the number of ranks, or if its indices are
    parts of a whole on the ranks. Every rank must call this at the same point.
    """
    gathered = all_gather({path: _facts(obj) for path, obj in _objects(loader)})
    world_size = len(gathered)
    if world_size == 1:
        return None
    for path, (name, *_) in gathered[0].items():
        found = [facts[path] for facts in gathered if path in facts]
        if len(found) < world_size:
            continue
        numbers, lists = [one[1] for one in found], [one[2] for one in found]
        if any(all(n.get(attribute) == rank for rank, n in enumerate(numbers)) for attribute in numbers[0]) and all(
            world_size in n.values() for n in numbers
        ):
            return str(name)
        for attribute in lists[0]:
            parts = [one.get(attribute) for one in lists]
            if all(part is not None for part in parts) and _are_parts(parts):
                return str(name)
    return None


def _objects(loader: Any) -> Iterator[tuple[str, Any]]:
    """Yield the loader, and what is inside it and might divide its data."""
    waiting, seen = [("loader", loader, 0)], set()
    while waiting:
        path, obj, depth = waiting.pop()
        if id(obj) in seen or depth > _DEEPEST or isinstance(obj, Tensor | np.ndarray | str | bytes | int | float):
            continue
        seen.add(id(obj))
        if isinstance(obj, list | tuple):
            waiting += [(f"{path}.{number}", entry, depth + 1) for number, entry in enumerate(obj[:8])]
            continue
        yield path, obj
        inside = {name: value for name, value in _variables(obj).items() if name in _INSIDE or _is_settings(value)}
        for name in _INSIDE:  # of loaders that wrap others
            if name not in inside and isinstance(value := _variables(obj).get(f"_{name}"), object):
                inside[name] = value
        waiting += [(f"{path}.{name}", value, depth + 1) for name, value in inside.items() if value is not None]


def _is_settings(value: Any) -> bool:
    """Return whether a value is a small object that may hold the rank, like those of Hugging Face's datasets."""
    return hasattr(value, "__dict__") and not callable(value) and len(vars(value)) <= 4


def _variables(obj: Any) -> dict[str, Any]:
    return getattr(obj, "__dict__", None) or {}


def _facts(obj: Any) -> tuple[str, dict[str, int], dict[str, Any]]:
    numbers: dict[str, int] = {}
    lists: dict[str, Any] = {}
    for name, value in _variables(obj).items():
        if type(value) is int:
            numbers[name] = value
        else:
            summary = _summary(value)
            if summary is not None:
                lists[name] = summary
    return type(obj).__name__, numbers, lists


def _summary(value: Any) -> Any:
    """Return what tells whether lists on several ranks are parts of a whole: moments of indices, or names."""
    if isinstance(value, Tensor | np.ndarray):
        value = np.asarray(value) if not isinstance(value, Tensor) or value.device.type == "cpu" else np.empty(0)
        if value.ndim != 1 or not np.issubdtype(value.dtype, np.integer):
            return None
    elif not isinstance(value, list | tuple | range) or any(type(v) not in (int, str) for v in value[:100]):
        return None
    if not 2 <= len(value) <= _LARGEST:
        return None
    try:
        if isinstance(value[0], str):
            return frozenset(os.path.basename(name) for name in value[:1000])  # each rank may have copies
        exact = [int(v) for v in value]
    except (TypeError, ValueError):
        return None
    return len(exact), min(exact), max(exact), sum(exact), sum(v * v for v in exact)


def _are_parts(parts: list[Any]) -> bool:
    if any(type(part) is not type(parts[0]) for part in parts):
        return False
    if isinstance(parts[0], frozenset):  # names of files
        return sum(len(part) for part in parts) == len(frozenset().union(*parts))
    count = sum(part[0] for part in parts)
    last = count - 1
    whole = (0, last, last * count // 2, last * count * (2 * last + 1) // 6)
    return whole == (
        min(part[1] for part in parts),
        max(part[2] for part in parts),
        sum(part[3] for part in parts),
        sum(part[4] for part in parts),
    )
