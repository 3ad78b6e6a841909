"""Take devices out of what ``lightning-hetero probe --json`` printed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hetero.balance.types import StepTime
from lightning_hetero.command.plan.yaml_file import read_text
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["ProbedDevice", "read_probe"]

_VERSION = 1


@dataclass(frozen=True)
class ProbedDevice:
    """One device of a machine.

    Attributes:
        name: of the model, and where it is.
        step_time: as measured; with ``is_relative`` in proportion to the device's nominal speed.
        is_relative: whether the time is of no known unit.
        memory_bytes: None where unknown.
        workload: what was measured; empty where nothing was.
    """

    name: str
    step_time: StepTime
    is_relative: bool
    memory_bytes: float | None
    workload: str


def read_probe(path: Path) -> list[ProbedDevice]:
    """Return the devices of a file that ``lightning-hetero probe --measure --json`` wrote.

    Where not every device was measured, the nominal speeds count, if all devices have one.

    Raises:
        ConfigurationError: it is no such file, or tells nothing of the speed of a device.
    """
    text = read_text(path)
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise ConfigurationError(_no_probe(path, "no JSON")) from None
    if not isinstance(found, dict) or "lightning_hetero_probe" not in found:
        raise ConfigurationError(_no_probe(path, "other JSON"))
    if found["lightning_hetero_probe"] != _VERSION:
        raise ConfigurationError(
            f"{path} must be of version {_VERSION}, got {found['lightning_hetero_probe']!r}. Probe the machine anew."
        )
    try:
        devices = [_device(found["host"], one) for one in found["devices"]]
    except (KeyError, TypeError, ValueError, AttributeError, ConfigurationError) as error:
        raise ConfigurationError(_no_probe(path, f"a damaged one ({type(error).__name__}: {error})")) from None
    if not devices:
        raise ConfigurationError(f"{path} must list at least one device, got none.")
    return _comparable(path, devices)


def _no_probe(path: Path, got: str) -> str:
    return f"{path} must be what `lightning-hetero probe --measure --json` printed, got {got}."


def _device(host: str, values: dict[str, Any]) -> tuple[str, float | None, StepTime | None, float | None, str]:
    name = f"{values['name']} ({host} {values['device']})"
    if not name.isprintable():
        raise ValueError(f"the name {name!r}")
    measured, memory, nominal = values["measured"], values["memory_bytes"], values["nominal_speed"]
    time, workload = None, ""
    if measured is not None:
        time = StepTime(float(measured["overhead_s"]), float(measured["seconds_per_sample"]))
        workload = str(measured["workload"])
    return name, None if nominal is None else float(nominal), time, None if memory is None else float(memory), workload


def _comparable(
    path: Path, devices: list[tuple[str, float | None, StepTime | None, float | None, str]]
) -> list[ProbedDevice]:
    all_measured = all(time is not None for _, _, time, _, _ in devices)
    found = []
    for name, nominal, time, memory, workload in devices:
        if all_measured and time is not None:
            found.append(ProbedDevice(name, time, False, memory, workload))
        elif nominal is not None and nominal > 0:
            found.append(ProbedDevice(name, StepTime(0.0, 1 / nominal), True, memory, ""))
        else:
            raise ConfigurationError(
                f"{path} must tell how fast each device is, but not all were measured, and {name} has no nominal"
                f" speed. Run `lightning-hetero probe --measure --json` on that machine."
            )
    return found
