"""Temporarily replace an attribute of one object; this package overrides other code's objects in this way only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

__all__ = ["overridden", "overridden_method", "overridden_on_class"]

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


@contextmanager
def overridden_method(obj: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Call ``around(method, *args)`` instead of the object's ``method(*args)`` in this context.

    Args:
        obj: The object whose method is replaced.
        name: The method's name.
        around: Function that gets the method itself before the arguments of the call.
    """
    with overridden(obj, name, _Around(obj, name, around)):
        yield


class _Around:
    """Takes the place of a method. A copy of the object has the method itself."""

    def __init__(self, obj: Any, name: str, around: Callable[..., Any]) -> None:
        self._of = (obj, name) if name not in vars(obj) else None
        self._method = getattr(obj, name)
        self._around = around
        update_wrapper(self, self._method, updated=())  # torch.compile asks for the name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._method, *args, **kwargs)

    def __reduce__(self) -> Any:
        return (getattr, self._of) if self._of is not None else (_itself, (self._method,))


def _itself(method: Any) -> Any:
    return method


@contextmanager
def overridden_on_class(cls: type[Any], name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Give all objects of a class another method in this context."""
    before = vars(cls).get(name, _MISSING)
    setattr(cls, name, function)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(cls, name)
        else:
            setattr(cls, name, before)
