"""Digests of values, in which a tensor is represented by its identity and the number of its changes."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import weakref
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor

from lightning_hetero.distributed.torch_private import version_of

__all__ = ["Buffer", "Digest", "Numbers", "is_local"]


class Buffer:
    """A buffer as an attribute: it is a known object, and what counts is its value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Numbers:
    """Numbers tensors and other objects by their identity, as long as they live."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Any, int]] = {}
        self._next = 0

    def of(self, obj: Any) -> int:
        """Return the number of an object; an object that has died is never confused with a new one."""
        reference, number = self._of.get(id(obj), (None, -1))
        if reference is None or reference() is not obj:
            try:
                reference = weakref.ref(obj)
            except TypeError:
                kept = obj
                reference = lambda: kept  # noqa: E731
            self._next += 1
            self._of[id(obj)], number = (reference, self._next), self._next
        return number

    def new(self) -> int:
        """Return a number that no object has."""
        self._next += 1
        return self._next

    def clean(self) -> None:
        """Forget what has died."""
        self._of = {key: kept for key, kept in self._of.items() if kept[0]() is not None}


class Digest(pickle.Pickler):
    """Computes a digest of a value without keeping its pickled form."""

    def __init__(self, sink: Any, known: Mapping[int, Any], numbers: Numbers) -> None:
        super().__init__(sink, protocol=5)
        self.leaves: list[Any] = []
        self._known = known
        self._numbers = numbers

    @classmethod
    def of(cls, value: Any, known: Mapping[int, Any], numbers: Numbers) -> tuple[bytes, list[Any]]:
        """Return the digest, and the objects in the value that cannot be sent but may be on every rank."""
        if isinstance(value, Buffer):
            return repr(_version(value.value, numbers)).encode(), []
        if value is None or type(value) in (bool, int, float, str):
            return repr((type(value).__name__, value)).encode(), []
        sink = _Sink()
        pickler = cls(sink, known, numbers)
        try:
            pickler.dump(value)
        except Exception:  # objects raise whatever they like when they are pickled
            return f"object {numbers.of(value)}".encode(), [value]
        return sink.hash.digest(), pickler.leaves

    def persistent_id(self, obj: Any) -> Any:
        """Return what stands for an object; None for one that is pickled."""
        if isinstance(obj, Tensor) and id(obj) not in self._known:
            return _version(obj, self._numbers)
        if id(obj) in self._known:
            return str(self._known[id(obj)])
        if is_local(obj):
            self.leaves.append(obj)
            return self._numbers.of(obj)
        return None


class _Sink:
    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=16)

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


def _version(tensor: Tensor, numbers: Numbers) -> tuple[int, int]:
    # changes of inference tensors are not counted
    return (numbers.new(), 0) if tensor.is_inference() else (numbers.of(tensor), version_of(tensor))


def is_local(obj: Any) -> bool:
    """Return whether an object cannot be pickled, but may have its like on every rank."""
    if isinstance(obj, FunctionType | type | BuiltinFunctionType):
        owner = getattr(obj, "__self__", None)  # of a bound method in C
        if owner is not None and not isinstance(owner, ModuleType):
            return False
        return not _is_importable(obj)
    if isinstance(obj, ModuleType | io.IOBase | weakref.ref):
        return True
    if isinstance(obj, MethodType):
        return False
    return type(obj).__module__ in ("_thread", "_io", "_socket") or type(obj).__name__ in (
        "generator", "coroutine", "frame", "code",
    )  # fmt: skip


def _is_importable(obj: Any) -> bool:
    found: Any = sys.modules.get(getattr(obj, "__module__", None) or "builtins")
    for name in getattr(obj, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is obj
