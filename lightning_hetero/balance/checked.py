"""Validate untrusted state: a saved state may be damaged, of a later version, or of another kind.

Every function checks a value before it uses it, and raises a
:class:`~lightning_hetero.exceptions.ConfigurationError` that names the value and the rule that it breaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from lightning_hetero.exceptions import ConfigurationError

__all__ = [
    "as_array",
    "as_bool",
    "as_float",
    "as_int",
    "as_ints",
    "as_list",
    "as_mapping",
    "as_str",
    "entry",
]

# Larger integers are not exact as floating-point numbers, and no count comes near this one.
_MAX_INT = 2**53
# No time in seconds, size or fraction comes near; results of arithmetic on such numbers stay finite.
_MAX_NUMBER = 1e12
_MAX_CHARACTERS = 80


def as_mapping(value: Any, name: str) -> Mapping[str, Any]:
    """Return ``value``, which must be a mapping."""
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"`{name}` must be a mapping, got {_shown(value)}.")
    return value


def entry(values: Mapping[str, Any], name: str) -> Any:
    """Return the entry called ``name``, which must exist."""
    if name not in values:
        raise ConfigurationError(f"`{name}` must be present, got only {_shown(sorted(map(str, values)))}.")
    return values[name]


def as_list(value: Any, name: str, length: int | None = None) -> Sequence[Any]:
    """Return ``value``, which must be a list, with ``length`` entries if that is given."""
    if not isinstance(value, list | tuple):
        raise ConfigurationError(f"`{name}` must be a list, got {_shown(value)}.")
    if length is not None and len(value) != length:
        raise ConfigurationError(f"`{name}` must have {length} entries, got {len(value)}.")
    return value


def as_str(value: Any, name: str) -> str:
    """Return ``value``, which must be a string."""
    if not isinstance(value, str):
        raise ConfigurationError(f"`{name}` must be a string, got {_shown(value)}.")
    return value


def as_bool(value: Any, name: str) -> bool:
    """Return ``value``, which must be true or false."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"`{name}` must be true or false, got {_shown(value)}.")
    return value


def as_int(value: Any, name: str, minimum: int = 0) -> int:
    """Return ``value``, which must be an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < _MAX_INT:
        raise ConfigurationError(
            f"`{name}` must be an integer of at least {minimum} and below 2**53, got {_shown(value)}."
        )
    return value


def as_ints(value: Any, name: str, length: int | None = None) -> tuple[int, ...]:
    """Return ``value``, which must be a list of non-negative integers."""
    return tuple(as_int(item, name) for item in as_list(value, name, length))


def as_float(value: Any, name: str, minimum: float = -_MAX_NUMBER, maximum: float = _MAX_NUMBER) -> float:
    """Return ``value``, which must be a finite number from ``minimum`` to ``maximum``."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise ConfigurationError(
            f"`{name}` must be a number of at least {minimum:g} and at most {maximum:g}, got {_shown(value)}."
        )
    return float(value)


def as_array(value: Any, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return nested lists of finite numbers, which must have exactly this shape, as an array."""
    return cast("npt.NDArray[np.float64]", np.array(_nested(value, name, shape), dtype=np.float64).reshape(shape))


def _nested(value: Any, name: str, shape: tuple[int, ...]) -> Any:
    if not shape:
        return as_float(value, name)
    return [_nested(item, name, shape[1:]) for item in as_list(value, name, shape[0])]


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except Exception:  # a foreign object, or an integer too long to print
        return f"an object of type {type(value).__name__}"
    return shown if len(shown) <= _MAX_CHARACTERS else f"{shown[:_MAX_CHARACTERS]}..."
