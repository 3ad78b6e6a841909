"""List the devices of this machine and suggest a share of the batch for each.

Without --measure the suggestion rests on the data that the driver reports, if it is known for all devices. A training
with the strategy hetero_ddp needs neither probe nor shares: it measures its own steps and finds its shares by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_hetero.exceptions import ConfigurationError, HeteroError

if TYPE_CHECKING:
    from lightning_hetero.command.probe.first_guess import FirstGuess
    from lightning_hetero.hardware.machine import Machine

__all__ = ["add_arguments", "run"]

_FORMAT = "lightning_hetero_probe"
_VERSION = 1
_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``probe``."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print one JSON object instead of a table; `lightning-hetero plan` can read it.",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="Train a small network on every device, one after the other, and suggest shares by measured speed.",
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        help=f"Measure each device for about this many seconds (default: {_SECONDS:g}). It requires --measure.",
    )


def run(options: argparse.Namespace) -> None:
    """Print the devices of this machine and their suggested shares."""
    seconds = _seconds(options)
    # before the import of torch, so that the meter averages over the seconds that the import takes
    from lightning_hetero.hardware.processor import LoadMeter

    load = LoadMeter()
    from lightning_hetero.command.probe.device_notes import device_notes
    from lightning_hetero.command.probe.first_guess import first_guess
    from lightning_hetero.hardware.machine import describe_machine

    machine = describe_machine(load)
    if options.measure:
        machine = _measured(machine, seconds)
    guess = first_guess(machine.devices)
    notes = [*machine.notes, *device_notes(machine.devices), *guess.notes]
    if options.json:
        print(json.dumps(_json(machine, guess, notes), indent=2))  # noqa: T201  # a command prints
    else:
        _print(machine, guess, notes)


def _seconds(options: argparse.Namespace) -> float:
    if options.seconds is None:
        return _SECONDS
    try:
        seconds = float(options.seconds)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigurationError(
            f"`--seconds` must be a positive number of seconds, got {options.seconds!r}. The default is {_SECONDS:g}."
        )
    if not options.measure:
        raise ConfigurationError(
            "`--seconds` sets the duration of a measurement: add `--measure`, or leave `--seconds` out."
        )
    return seconds


def _measured(machine: Machine, seconds: float) -> Machine:
    """Return the machine with measured devices; a device that fails becomes a note, and the others are measured."""
    import torch

    from lightning_hetero.hardware.benchmark import measure_device

    devices, notes = [], list(machine.notes)
    for number, report in enumerate(machine.devices):
        if sys.stderr.isatty():
            progress = f"{number + 1} of {len(machine.devices)}"
            print(f"measuring {report.device} ({progress}), about {seconds:g} s", file=sys.stderr)  # noqa: T201
        try:
            devices.append(replace(report, measured=measure_device(torch.device(report.device), seconds)))
        except HeteroError as error:
            devices.append(report)
            notes.append(str(error))
    return replace(machine, devices=tuple(devices), notes=tuple(notes))


def _json(machine: Machine, guess: FirstGuess, notes: list[str]) -> dict[str, Any]:
    return {
        _FORMAT: _VERSION,
        "host": machine.host,
        "devices": [report.to_dict() for report in machine.devices],
        "shares": list(guess.shares),
        "notes": notes,
    }


def _print(machine: Machine, guess: FirstGuess, notes: list[str]) -> None:
    """Print the table and the notes, as wide as the terminal, or in 80 columns if there is none."""
    from rich.console import Console

    from lightning_hetero.command.probe.device_table import device_table

    console = Console()
    console = Console(width=None if console.is_terminal else 80, highlight=False, markup=False)
    console.print(f"Devices of {machine.host}")
    console.print(device_table(machine.devices, guess.shares))
    workloads = {report.measured.workload for report in machine.devices if report.measured}
    for note in [*(f"Measured: {workload}." for workload in sorted(workloads)), *notes]:
        console.print(note)
