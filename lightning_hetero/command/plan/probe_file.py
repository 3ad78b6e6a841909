"""Read devices from the output of ``lightning-hetero probe --json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hetero.balance.checked import as_float, as_list, as_mapping, as_str, entry
from lightning_hetero.balance.types import StepTime
from lightning_hetero.command.plan.yaml_file import read_text
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["ProbedDevice", "read_probe"]

_VERSION = 1
_MAX_NUMBER = 1e300


@dataclass(frozen=True)
class ProbedDevice:
    """One device of a probed machine.

    Attributes:
        name: Name of the model, with the machine and the device.
        step_time: Measured step time; with ``is_relative``, a time in inverse proportion to the nominal speed.
        is_relative: Whether the unit of the time is unknown.
        memory_bytes: Memory of the device; None if unknown.
        workload: Description of the measured workload; empty if nothing was measured.
    """

    name: str
    step_time: StepTime
    is_relative: bool
    memory_bytes: float | None
    workload: str


def read_probe(path: Path) -> list[ProbedDevice]:
    """Return the devices in a file with the output of ``lightning-hetero probe --measure --json``.

    If not every device was measured, nominal speeds are used, provided that all devices have one.

    Raises:
        ConfigurationError: The file has other content, or it does not give the speed of a device.
    """
    text = read_text(path)
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise ConfigurationError(_not_a_probe(path, "a file that is not JSON.")) from None
    if not isinstance(found, dict) or "lightning_hetero_probe" not in found:
        raise ConfigurationError(_not_a_probe(path, "other JSON."))
    if found["lightning_hetero_probe"] != _VERSION:
        raise ConfigurationError(
            f"{path} must be of version {_VERSION}, got {found['lightning_hetero_probe']!r}. Run the probe again."
        )
    try:
        host = as_str(entry(found, "host"), "host")
        devices = [_read_device(host, one) for one in as_list(entry(found, "devices"), "devices")]
    except ConfigurationError as error:
        raise ConfigurationError(_not_a_probe(path, f"a damaged one: {error}")) from None
    if not devices:
        raise ConfigurationError(f"{path} must list at least one device, got none.")
    return _comparable(path, devices)


def _not_a_probe(path: Path, got: str) -> str:
    return f"{path} must contain the output of `lightning-hetero probe --measure --json`, got {got}"


@dataclass(frozen=True)
class _Entry:
    name: str
    nominal_speed: float | None
    memory_bytes: float | None
    step_time: StepTime | None = None
    workload: str = ""


def _read_device(host: str, value: Any) -> _Entry:
    values = as_mapping(value, "devices")
    model, device = (as_str(entry(values, key), key) for key in ("name", "device"))
    name = f"{model} ({host} {device})"
    if not name.isprintable():
        raise ConfigurationError(f"`name`, `host` and `device` must be printable, got {name!r}.")
    nominal_speed, memory_bytes = (_optional_number(values, key) for key in ("nominal_speed", "memory_bytes"))
    measured = entry(values, "measured")
    if measured is None:
        return _Entry(name, nominal_speed, memory_bytes)
    workload = as_str(entry(as_mapping(measured, "measured"), "workload"), "workload")
    return _Entry(name, nominal_speed, memory_bytes, StepTime.from_dict(measured), workload)


def _optional_number(values: Mapping[str, Any], key: str) -> float | None:
    value = entry(values, key)
    return None if value is None else as_float(value, key, 0, _MAX_NUMBER)


def _comparable(path: Path, devices: list[_Entry]) -> list[ProbedDevice]:
    """Return the devices by measured time if all were measured, else by nominal speed."""
    all_measured = all(device.step_time is not None for device in devices)
    found = []
    for device in devices:
        if all_measured and device.step_time is not None:
            found.append(ProbedDevice(device.name, device.step_time, False, device.memory_bytes, device.workload))
        elif device.nominal_speed:
            found.append(
                ProbedDevice(device.name, StepTime(0.0, 1 / device.nominal_speed), True, device.memory_bytes, "")
            )
        else:
            raise ConfigurationError(
                f"{path} must give the speed of each device, but not all were measured, and {device.name} has no"
                f" nominal speed. Run `lightning-hetero probe --measure --json` on that machine."
            )
    return found
