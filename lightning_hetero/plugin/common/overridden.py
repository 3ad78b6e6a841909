"""Temporarily replace an attribute of one object; this package overrides other code's objects in this way only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["overridden"]

_MISSING = object()


@contextmanager
def overridden(obj: Any, name: str, value: Any) -> Iterator[None]:
    """Set ``obj.name`` to ``value`` in this context, and restore it afterwards.

    Python finds methods on the instance before its class, so a function replaces the method of this one object. The
    value is written to the object's ``__dict__``, because ``__setattr__`` of a module would register it.

    Args:
        obj: The object whose attribute is replaced.
        name: The attribute's name.
        value: Value of the attribute in this context.
    """
    before = obj.__dict__.get(name, _MISSING)
    obj.__dict__[name] = value
    try:
        yield
    finally:
        obj.__dict__.pop(name, None)
        if before is not _MISSING:
            obj.__dict__[name] = before
