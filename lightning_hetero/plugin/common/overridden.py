"""Replace an attribute of one object for a while; everything that this package overrides on objects of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["overridden"]

_MISSING = object()


@contextmanager
def overridden(obj: Any, name: str, value: Any) -> Iterator[None]:
    """Have ``obj.name`` be ``value`` in this context, and what it was before afterwards.

    Methods are found on the instance before its class, so a function replaces a method of this one object. It goes into
    the object's ``__dict__``, past ``__setattr__``: that of a module would register it.

    Args:
        obj: The object whose attribute is replaced.
        name: The attribute's name.
        value: The value in its place.
    """
    before = obj.__dict__.get(name, _MISSING)
    obj.__dict__[name] = value
    try:
        yield
    finally:
        obj.__dict__.pop(name, None)
        if before is not _MISSING:
            obj.__dict__[name] = before
