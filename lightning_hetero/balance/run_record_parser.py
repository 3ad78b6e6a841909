"""Read the record of a run, believing nothing: it may be cut off, damaged, or another file.

Events that a later version may have added are left out, and a last line that was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from lightning_hetero.balance.run_record import (
    EVENTS,
    RECORD_FORMAT,
    RECORD_VERSION,
    Event,
    RunAdvice,
    RunChange,
    RunEnd,
    RunHeader,
    RunPasses,
    RunRecord,
    RunStages,
    RunWindow,
)
from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["parse_record"]


def parse_record(lines: Iterable[str], name: str = "the record") -> RunRecord:
    """Return what the lines of a record say.

    Args:
        lines: all lines, as read from a file.
        name: what to call the record in errors.

    Raises:
        ConfigurationError: this is no record, of a later version, or damaged in its midst; the message names the line.
    """
    rows = [line for line in lines if line.strip()]
    if not rows:
        raise ConfigurationError(f"{name} must be the record of a run, got an empty file. Has the run begun to train?")
    header = _header(rows[0], name)
    events: list[Event] = []
    for number, row in enumerate(rows[1:], start=2):
        values = _object(row)
        if values is None:
            if number == len(rows):
                break  # the run was killed, or is at this moment, while it wrote this line
            raise ConfigurationError(f"{name} must have one JSON object a line, got something else in line {number}.")
        event = _event(values, header, f"{name}, line {number}")
        if event is not None:
            events.append(event)
    return RunRecord(
        header=header,
        windows=tuple(e for e in events if isinstance(e, RunWindow)),
        changes=tuple(e for e in events if isinstance(e, RunChange)),
        advice=_latest(events, RunAdvice),
        stages=_latest(events, RunStages),
        passes=_latest(events, RunPasses),
        end=_latest(events, RunEnd),
    )


_E = TypeVar("_E")


def _latest(events: Sequence[Event], kind: type[_E]) -> _E | None:
    return next((event for event in reversed(events) if isinstance(event, kind)), None)


def _object(row: str) -> dict[str, Any] | None:
    try:
        values = json.loads(row, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _no_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are no JSON, and never written


def _header(row: str, name: str) -> RunHeader:
    values = _object(row)
    if values is None or values.get("record") != RECORD_FORMAT:
        raise ConfigurationError(
            f"{name} must be the record of a run, which `LoadBalancer` writes beside the logs, got another file."
        )
    if values.get("version") != RECORD_VERSION:
        raise ConfigurationError(
            f"{name} must be of version {RECORD_VERSION}, got {values.get('version')!r}. Read it with the version of"
            f" lightning_hetero that wrote it ({values.get('package')!r})."
        )
    where = f"{name}, line 1"
    devices = values.get("devices")
    if not isinstance(devices, list) or not devices or not all(isinstance(device, dict) for device in devices):
        raise ConfigurationError(f"{where}: `devices` must list what each rank runs on, got {devices!r}.")
    return RunHeader(
        strategy=_text(values, "strategy", where),
        started=_text(values, "started", where),
        global_batch_size=_whole(values, "global_batch_size", where),
        devices=tuple(
            DeviceProfile(
                host=_text(device, "host", where),
                device=_text(device, "device", where),
                name=_text(device, "name", where),
            )
            for device in devices
        ),
        package=_text(values, "package", where),
    )


def _event(values: dict[str, Any], header: RunHeader, where: str) -> Event | None:
    kind = next((event for event in EVENTS if event.kind == values.get("event")), None)
    if kind is None:
        return None
    read = {
        name: _READERS[str(declared)](values, name, where)
        for name, declared in kind.__annotations__.items()
        if name != "kind"
    }
    event = kind(**read)
    _check_lengths(event, header.world_size, where)
    return event


def _check_lengths(event: Event, world_size: int, where: str) -> None:
    """Check that what belongs to ranks has one entry a rank, and what belongs to passes as many as there are passes."""
    fixed = {"sentences"}
    optional = {"overhead_s", "seconds_per_sample", "peak_bytes", "budget_bytes", "forward_s", "backward_s"}
    expected = len(event.stages) if isinstance(event, RunPasses) else world_size
    for name, value in vars(event).items():
        if not isinstance(value, tuple) or name in fixed or (not value and name in optional):
            continue
        if len(value) != expected:
            raise ConfigurationError(f"{where}: `{name}` must have {expected} entries, got {len(value)}.")
    if isinstance(event, RunWindow) and len(event.overhead_s) != len(event.seconds_per_sample):
        raise ConfigurationError(f"{where}: `overhead_s` and `seconds_per_sample` must both be there or both be empty.")
    if isinstance(event, RunPasses) and any(not 0 <= stage < world_size for stage in event.stages):
        raise ConfigurationError(f"{where}: `stages` must be below the number of ranks ({world_size}).")
    if isinstance(event, RunStages) and (
        sorted(event.ranks) != list(range(world_size)) or any(a >= b for a, b in pairwise((0, *event.ends)))
    ):
        raise ConfigurationError(f"{where}: `ranks` and `ends` must be those of one stage a rank.")


def _text(values: Mapping[str, Any], name: str, where: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise ConfigurationError(f"{where}: `{name}` must be a text, got {value!r}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300


def _number(values: Mapping[str, Any], name: str, where: str) -> float:
    value = values.get(name)
    if not _is_number(value):
        raise ConfigurationError(f"{where}: `{name}` must be a number that is not negative, got {value!r}.")
    return float(value)  # type: ignore[arg-type]  # checked above


def _whole(values: Mapping[str, Any], name: str, where: str) -> int:
    value = values.get(name)
    if not _is_number(value) or not isinstance(value, int):
        raise ConfigurationError(f"{where}: `{name}` must be an integer that is not negative, got {value!r}.")
    return value


def _truth(values: Mapping[str, Any], name: str, where: str) -> bool:
    value = values.get(name)
    if not isinstance(value, bool):
        raise ConfigurationError(f"{where}: `{name}` must be true or false, got {value!r}.")
    return value


_T = TypeVar("_T")


def _several(
    one: Callable[[Mapping[str, Any], str, str], _T],
) -> Callable[[Mapping[str, Any], str, str], tuple[_T, ...]]:
    def read(values: Mapping[str, Any], name: str, where: str) -> tuple[_T, ...]:
        items = values.get(name)
        if not isinstance(items, list):
            raise ConfigurationError(f"{where}: `{name}` must be a list, got {items!r}.")
        return tuple(one({name: item}, name, where) for item in items)

    return read


# what the annotations of the events say
_READERS: dict[str, Callable[[Mapping[str, Any], str, str], Any]] = {
    "str": _text,
    "int": _whole,
    "float": _number,
    "bool": _truth,
    "tuple[int, ...]": _several(_whole),
    "tuple[float, ...]": _several(_number),
    "tuple[bool, ...]": _several(_truth),
    "tuple[str, ...]": _several(_text),
}
