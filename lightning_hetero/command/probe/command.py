"""List the devices of this machine and a first guess at their shares."""

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
    """Declare what ``probe`` takes."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, which `plan` reads, and no table")
    parser.add_argument(
        "--measure", action="store_true", help="train a small network on every device and compare their speeds"
    )
    parser.add_argument(
        "--seconds", metavar="S", help=f"with --measure: about how long on each device, {_SECONDS:g} by default"
    )


def run(options: argparse.Namespace) -> None:
    """Print what this machine has."""
    seconds = _seconds(options)
    # before the import of torch, so that the meter sees a few seconds of what else this machine does
    from lightning_hetero.hardware.processor import LoadMeter

    load = LoadMeter()
    from lightning_hetero.command.probe.device_notes import device_notes
    from lightning_hetero.command.probe.first_guess import first_guess
    from lightning_hetero.hardware.machine import describe_machine

    machine = describe_machine(load)
    if options.measure:
        machine = _measured(machine, seconds)
    guess = first_guess(machine.devices)
    notes = [*machine.notes, *device_notes(machine.devices), *guess.sentences]
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
            f"`--seconds` must be a positive number of seconds, got {options.seconds!r}; {_SECONDS:g} is the default."
        )
    if not options.measure:
        raise ConfigurationError("`--seconds` says how long to measure: add `--measure`, or leave it out.")
    return seconds


def _measured(machine: Machine, seconds: float) -> Machine:
    """Return the machine with measured devices; one that fails becomes a sentence, and the others go on."""
    import torch

    from lightning_hetero.hardware.benchmark import measure_device

    devices, notes = [], list(machine.notes)
    for number, report in enumerate(machine.devices):
        if sys.stderr.isatty():
            of = f"{number + 1} of {len(machine.devices)}"
            print(f"measuring {report.device} ({of}), about {seconds:g} s", file=sys.stderr)  # noqa: T201
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
    """Print the table and the sentences; on a terminal no wider than the terminal, elsewhere in 80 columns."""
    from rich.console import Console

    from lightning_hetero.command.probe.device_table import device_table

    console = Console()
    console = Console(width=None if console.is_terminal else 80, highlight=False, markup=False)
    console.print(f"devices of {machine.host}")
    console.print(device_table(machine.devices, guess.shares))
    workloads = {report.measured.workload for report in machine.devices if report.measured}
    for sentence in [*(f"Measured: {workload}." for workload in sorted(workloads)), *notes]:
        console.print(sentence)
