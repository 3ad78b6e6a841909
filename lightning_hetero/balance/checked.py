"""Read plain values of a saved state, believing nothing: it may be damaged, of a later version, or of something else.

Every function raises a :class:`~lightning_hetero.exceptions.ConfigurationError` that names what is wrong, and looks at
a value before it makes anything of it.
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

# Whole numbers above are not exact as floating-point numbers, and none that is counted here comes near.
_MOST_WHOLE = 2**53
# No time in seconds, size or part comes near; what is computed from such numbers stays finite.
_MOST_NUMBER = 1e12
_SHOWN = 80


def as_mapping(value: Any, name: str) -> Mapping[str, Any]:
    """Return ``value``, which has to be a mapping."""
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"`{name}` must be a mapping, got {_shown(value)}.")
    return value


def entry(values: Mapping[str, Any], name: str) -> Any:
    """Return the entry of that name, which has to be there."""
    if name not in values:
        raise ConfigurationError(f"`{name}` must be there, got {_shown(sorted(map(str, values)))}.")
    return values[name]


def as_list(value: Any, name: str, length: int | None = None) -> Sequence[Any]:
    """Return ``value``, which has to be a list, of ``length`` entries where that is given."""
    if not isinstance(value, list | tuple):
        raise ConfigurationError(f"`{name}` must be a list, got {_shown(value)}.")
    if length is not None and len(value) != length:
        raise ConfigurationError(f"`{name}` must have {length} entries, got {len(value)}.")
    return value


def as_str(value: Any, name: str) -> str:
    """Return ``value``, which has to be a text."""
    if not isinstance(value, str):
        raise ConfigurationError(f"`{name}` must be a text, got {_shown(value)}.")
    return value


def as_bool(value: Any, name: str) -> bool:
    """Return ``value``, which has to be true or false."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"`{name}` must be true or false, got {_shown(value)}.")
    return value


def as_int(value: Any, name: str, least: int = 0) -> int:
    """Return ``value``, which has to be an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST_WHOLE:
        raise ConfigurationError(
            f"`{name}` must be an integer of at least {least} and below 2**53, got {_shown(value)}."
        )
    return value


def as_ints(value: Any, name: str, length: int | None = None) -> tuple[int, ...]:
    """Return ``value``, which has to be a list of integers that are not negative."""
    return tuple(as_int(item, name) for item in as_list(value, name, length))


def as_float(value: Any, name: str, least: float = -_MOST_NUMBER, most: float = _MOST_NUMBER) -> float:
    """Return ``value``, which has to be a finite number of a sensible size."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigurationError(
            f"`{name}` must be a number of at least {least:g} and at most {most:g}, got {_shown(value)}."
        )
    return float(value)


def as_array(value: Any, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return nested lists of finite numbers of exactly that shape as an array."""
    return cast("npt.NDArray[np.float64]", np.array(_nested(value, name, shape), dtype=np.float64).reshape(shape))


def _nested(value: Any, name: str, shape: tuple[int, ...]) -> Any:
    if not shape:
        return as_float(value, name)
    return [_nested(item, name, shape[1:]) for item in as_list(value, name, shape[0])]


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except Exception:  # an object of somebody else, or an integer too long to print
        return f"an object of type {type(value).__name__}"
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
