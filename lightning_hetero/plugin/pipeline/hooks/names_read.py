"""Find out which names a hook mentions, to know what it may read before it runs."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["is_users", "names_before", "names_read"]

# Their functions are not followed: they do not know the user's attributes.
_FOREIGN = ("torch", "numpy", "torchmetrics", "builtins")
_BASES = ("lightning", "pytorch_lightning", "torch", "builtins", "lightning_hetero")


def names_read(functions: Iterable[Any], *owners: Any) -> set[str]:
    """Return all names and strings in the code of functions, and of the methods and helpers that they mention.

    Args:
        functions: Functions or methods. What is neither has no names.
        owners: Objects whose classes have the methods that they mention.
    """
    found: set[str] = set()
    seen: set[CodeType] = set()
    waiting = [f for function in functions if (f := _function(function)) is not None]
    while waiting:
        function = waiting.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        names = {name for code in _codes(function.__code__) for name in _names(code)}
        found |= names
        for name in names:
            waiting += [f for f in _helpers(function, name, *owners) if f.__code__ not in seen]
    return found


def names_before(step: Any, owner: Any, called: str) -> set[str]:
    """Return the names that a step mentions before it mentions ``called``, and in the helpers that it calls until then.

    Args:
        step: Method of ``owner``.
        owner: Object whose class has the methods that the step mentions.
        called: Name of the attribute that holds the model.
    """
    names, _ = _until(step, owner, called, set())
    return names


def _until(step: Any, owner: Any, called: str, seen: set[CodeType]) -> tuple[set[str], bool]:
    function = _function(step)
    if function is None or function.__code__ in seen:
        return set(), False
    seen.add(function.__code__)
    found: set[str] = set()
    is_called = False
    for instruction in dis.get_instructions(function.__code__):
        # the arguments of the call follow the name; the call ends with its statement
        if is_called and instruction.opname.startswith(("STORE_", "RETURN_", "POP_TOP", "POP_JUMP")):
            return found, True
        if isinstance(instruction.argval, CodeType):
            found |= {name for code in _codes(instruction.argval) for name in _names(code)}
        name = instruction.argval if isinstance(instruction.argval, str) else None
        if name is None:
            continue
        is_called = is_called or name == called
        if instruction.opname.startswith("LOAD_"):
            found.add(name)
        for helper in _helpers(function, name, owner):
            inner, ended = _until(helper, owner, called, seen)
            found |= inner
            if ended:
                return found, True
    return found, is_called


def _helpers(function: FunctionType, name: str, *owners: Any) -> Iterator[FunctionType]:
    """Yield the functions of the user that ``function`` may mean by ``name``."""
    for cls in (cls for owner in owners for cls in type(owner).__mro__):
        helper = _function(vars(cls).get(name))
        if helper is not None and is_users(helper):
            yield helper
    value = function.__globals__.get(name)
    if isinstance(value, FunctionType) and value.__module__.split(".")[0] not in _FOREIGN:
        yield value
    if isinstance(value, ModuleType) and value.__name__.split(".")[0] not in (*_FOREIGN, *_BASES):
        mentioned = set(function.__code__.co_names)
        yield from (v for n, v in vars(value).items() if n in mentioned and isinstance(v, FunctionType))


def is_users(function: Any) -> bool:
    """Return whether a function or method is neither torch's nor Lightning's nor this package's."""
    found = _function(function)
    return found is not None and (found.__module__ or "").split(".")[0] not in _BASES


def _function(value: Any) -> FunctionType | None:
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__wrapped__", value)
    value = getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    yield from (constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier())
