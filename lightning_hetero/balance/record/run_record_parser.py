"""Parse and validate the record of a run, which may be cut off, damaged, or another file altogether.

Unknown events, which a later version may have added, are ignored, and so is a last line that was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

from lightning_hetero.balance.checked import as_bool, as_float, as_int, as_list, as_mapping, as_str
from lightning_hetero.balance.record.run_record import (
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
    """Parse the lines of a record.

    Args:
        lines: All lines, as read from a file.
        name: Name of the record for error messages.

    Raises:
        ConfigurationError: The lines are not a record, of another version, or damaged before the last line; the message
            names the line.
    """
    rows = [line for line in lines if line.strip()]
    if not rows:
        raise ConfigurationError(f"{name} must be the record of a run, got an empty file. Has the training started?")
    header = _header(rows[0], name)
    events: list[Event] = []
    for number, row in enumerate(rows[1:], start=2):
        values = _object(row)
        if values is None:
            if number == len(rows):
                break  # the run was killed while it wrote this line, or is writing it now
            raise ConfigurationError(f"{name} must have one JSON object per line, got something else in line {number}.")
        event = _event(values, header, f"{name}, line {number}")
        if event is not None:
            events.append(event)
    return RunRecord(
        header=header,
        windows=tuple(e for e in events if isinstance(e, RunWindow)),
        changes=tuple(e for e in events if isinstance(e, RunChange)),
        advice=_latest(events, RunAdvice),
        stages=_latest(events, RunStages),
        earlier_stages=tuple(e for e in events if isinstance(e, RunStages))[:-1],
        passes=_latest(events, RunPasses),
        end=_latest(events, RunEnd),
    )


_KINDS = ("forward", "backward", "input", "weight")  # of passes

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
            f"{name} must be the record of a run, which `LoadBalancer` writes next to the logs, got another file."
        )
    if values.get("version") != RECORD_VERSION:
        raise ConfigurationError(
            f"{name} must be of version {RECORD_VERSION}, got {values.get('version')!r}. Read it with the version of"
            f" lightning_hetero that wrote it ({values.get('package')!r})."
        )
    with _located(f"{name}, line 1"):
        devices = as_list(values.get("devices"), "devices")
        if not devices:
            raise ConfigurationError("`devices` must list the device of each rank, got none.")
        return RunHeader(
            strategy=as_str(values.get("strategy"), "strategy"),
            started=as_str(values.get("started"), "started"),
            global_batch_size=as_int(values.get("global_batch_size"), "global_batch_size"),
            devices=tuple(_device(device) for device in devices),
            package=as_str(values.get("package"), "package"),
        )


def _device(value: Any) -> DeviceProfile:
    values = as_mapping(value, "devices")
    host, device, name = (as_str(values.get(key), key) for key in ("host", "device", "name"))
    return DeviceProfile(host, device, name)


def _event(values: dict[str, Any], header: RunHeader, where: str) -> Event | None:
    kind = next((event for event in EVENTS if event.kind == values.get("event")), None)
    if kind is None:
        return None
    declared = {name: str(type_) for name, type_ in kind.__annotations__.items() if name != "kind"}
    with _located(where):
        event = kind(**{name: _READERS[type_](values.get(name), name) for name, type_ in declared.items()})
    _check_lengths(event, header.world_size, where)
    return event


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Name the place in the record in the error of a wrong value."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _check_lengths(event: Event, world_size: int, where: str) -> None:
    """Check that sequences over ranks have one entry per rank, and sequences over passes one entry per pass."""
    fixed = {"sentences"}
    optional = {"overhead_s", "seconds_per_sample", "peak_bytes", "budget_bytes", "forward_s", "backward_s"}
    expected = world_size
    if isinstance(event, RunPasses | RunStages):
        expected = len(event.stages if isinstance(event, RunPasses) else event.ranks)
    for name, value in vars(event).items():
        if not isinstance(value, tuple) or name in fixed or (not value and name in optional):
            continue
        if len(value) != expected:
            raise ConfigurationError(f"{where}: `{name}` must have {expected} entries, got {len(value)}.")
    if isinstance(event, RunWindow) and len(event.overhead_s) != len(event.seconds_per_sample):
        raise ConfigurationError(
            f"{where}: `overhead_s` and `seconds_per_sample` must both be present or both be empty."
        )
    if isinstance(event, RunPasses) and (unknown := {*event.kinds} - {*_KINDS}):
        raise ConfigurationError(f"{where}: `kinds` must be {', '.join(_KINDS)}, got {min(unknown)!r}.")
    # a rank may have both ends of the model, and then there is one stage more than ranks
    if isinstance(event, RunPasses) and any(not 0 <= stage <= world_size for stage in event.stages):
        raise ConfigurationError(f"{where}: `stages` must be at most the number of ranks ({world_size}).")
    if isinstance(event, RunStages) and (
        {*event.ranks} != {*range(world_size)}
        or len(event.ranks) > world_size + 1
        or any(a >= b for a, b in pairwise((0, *event.ends)))
    ):
        raise ConfigurationError(f"{where}: `ranks` and `ends` must describe stages of all ranks.")


def _number_of(value: Any, name: str) -> float:
    return as_float(value, name, minimum=0, maximum=1e300)


_T = TypeVar("_T")


def _several(one: Callable[[Any, str], _T]) -> Callable[[Any, str], tuple[_T, ...]]:
    return lambda value, name: tuple(one(item, name) for item in as_list(value, name))


# how to read a field, by its annotation
_READERS: dict[str, Callable[[Any, str], Any]] = {
    "str": as_str,
    "int": as_int,
    "float": _number_of,
    "bool": as_bool,
    "tuple[int, ...]": _several(as_int),
    "tuple[float, ...]": _several(_number_of),
    "tuple[bool, ...]": _several(as_bool),
    "tuple[str, ...]": _several(as_str),
}
