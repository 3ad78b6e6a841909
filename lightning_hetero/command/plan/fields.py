"""Read values from a mapping that a person wrote, with errors that help to correct them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning_hetero.exceptions import ConfigurationError

__all__ = ["Fields", "shown"]

# YAML 1.1 reads 1e9 as a string, but people mean a number
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class Fields:
    """The values of a mapping, each checked when it is asked for.

    Args:
        values: Mapping to read.
        known: Keys that it may have.
        path: Path of the mapping in the file, for example ``"devices[1]"``; empty for the file itself.

    Raises:
        ConfigurationError: The values are not a mapping, or a key is unknown. All methods raise it, too, and name the
            path of the value.
    """

    def __init__(self, values: object, known: Collection[str], path: str = "") -> None:
        self.path = path
        if not isinstance(values, Mapping):
            where = f"`{path}`" if path else "The file"
            raise ConfigurationError(f"{where} must be a mapping of keys to values, got {shown(values)}.")
        self._values: Mapping[Any, Any] = values
        for key in values:
            if key not in known:
                self._refuse_key(key, known)

    def _refuse_key(self, key: object, known: Collection[str]) -> None:
        close = difflib.get_close_matches(str(key), known, n=1)
        way_out = f"Did you mean `{close[0]}`?" if close else f"Known keys are {', '.join(sorted(known))}."
        raise ConfigurationError(f"`{self.at(str(key))}` is not a known key. {way_out}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def at(self, key: str) -> str:
        """Return the path of a key."""
        key = key if key.isprintable() else repr(key)
        return f"{self.path}.{key}" if self.path else key

    def wrong(self, key: str, rule: str, way_out: str = "") -> ConfigurationError:
        """Return the error for a value that breaks ``rule``."""
        got = f"got {shown(self._values[key])}" if key in self._values else "it is missing"
        return ConfigurationError(f"`{self.at(key)}` must be {rule}, {got}.{way_out and ' ' + way_out}")

    def value(self, key: str, rule: str) -> Any:
        """Return a required value."""
        if key not in self._values:
            raise self.wrong(key, rule)
        return self._values[key]

    def number(self, key: str, default: float | None = None, above: float | None = 0.0) -> float:
        """Return a finite number above ``above``, or of at least 0 if that is None; required without a default."""
        if key not in self._values and default is not None:
            return default
        rule = "a number that is not negative" if above is None else f"a number above {above:g}"
        found = _number(self.value(key, rule))
        if found is None or (found < 0 if above is None else found <= above):
            raise self.wrong(key, rule)
        return found

    def optional_number(self, key: str, above: float | None = 0.0) -> float | None:
        """Return a number as :meth:`number` does; None if the key is missing."""
        return self.number(key, above=above) if key in self._values else None

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int | None = None) -> int:
        """Return a whole number from ``minimum`` to ``maximum``; required without a default."""
        if key not in self._values and default is not None:
            return default
        rule = f"a whole number of at least {minimum}" + ("" if maximum is None else f" and at most {maximum}")
        found = _number(self.value(key, rule))
        if found is None or found != int(found) or found < minimum or (maximum is not None and found > maximum):
            raise self.wrong(key, rule)
        return int(found)

    def optional_integer(self, key: str) -> int | None:
        """Return a whole number of at least 1; None if the key is missing."""
        return self.integer(key) if key in self._values else None

    def text(self, key: str, default: str | None = None) -> str:
        """Return a line of text; required without a default."""
        if key not in self._values and default is not None:
            return default
        found = self.value(key, "a line of text")
        if not isinstance(found, str) or not found.strip() or not found.isprintable():
            raise self.wrong(key, "a line of text", "Put it in quotes.")
        return found

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """Return one of ``choices``; required without a default."""
        if key not in self._values and default is not None:
            return default
        rule = f"one of {', '.join(choices)}"
        found = self.value(key, rule)
        if found not in choices:
            raise self.wrong(key, rule)
        return str(found)

    def items(self, key: str, rule: str) -> list[Any]:
        """Return a required list, which must not be empty."""
        found = self.value(key, rule)
        if not isinstance(found, list) or not found:
            raise self.wrong(key, rule)
        return found

    def one_of(self, keys: Sequence[str], what: str) -> str:
        """Return the only key of ``keys`` that is present."""
        found = [key for key in keys if key in self._values]
        if len(found) != 1:
            got = f"it has {' and '.join(found)}" if found else "it has none of them"
            where = f"`{self.path}`" if self.path else "The file"
            raise ConfigurationError(f"{where} must say {what} with exactly one of {', '.join(keys)}; {got}.")
        return found[0]

    def numbers(self, key: str) -> float | list[float]:
        """Return a required number that is not negative, or a list of such numbers."""
        found = self.value(key, "a number, or a list with one number for each parameter")
        if not isinstance(found, list):
            return self.number(key, above=None)
        numbers = [_number(one) for one in found]
        for i, one in enumerate(numbers):
            if one is None or one < 0:
                raise ConfigurationError(
                    f"`{self.at(key)}[{i}]` must be a number that is not negative, got {shown(found[i])}."
                )
        if not numbers:
            raise self.wrong(key, "a number, or a list with one number for each parameter")
        return [one for one in numbers if one is not None]


def _number(value: object) -> float | None:
    """Return a finite number; None for any other value."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer with hundreds of digits
        return None


def shown(value: object) -> str:
    """Return a short description of a value for a message, on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, list | Mapping):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
