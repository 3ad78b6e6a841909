"""Check on this machine's devices what a training relies on, and say what to send if something fails.

For some minutes it trains on small data: it compares with ddp and with one device, lets memory run out, measures times,
and makes ranks fail. Each check runs in processes of its own with a time limit. Without a GPU it runs two processes on
the processor, and skips what needs a GPU. The exit status is 0 if nothing failed, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lightning_hetero.command.check.catalogue import ENVIRONMENT, named
from lightning_hetero.command.check.layout import CPU, layout_of, parse_devices
from lightning_hetero.exceptions import ConfigurationError

if TYPE_CHECKING:
    from lightning_hetero.command.check.runner import Result

__all__ = ["add_arguments", "run"]

_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``check``."""
    parser.add_argument("--list", action="store_true", help="List the checks and exit.")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=[], help="Run these checks only.")
    parser.add_argument(
        "--devices",
        metavar="WHERE",
        help="Run on these CUDA devices, for example `0,1`; `0` runs two ranks on one card, `cpu` on the processor."
        " Default: two cards, of different models if there are any.",
    )
    parser.add_argument("--limit-s", metavar="S", help="Time limit of each check in seconds (default: 90 to 300).")
    parser.add_argument("--json", metavar="FILE", help="Also write one JSON object per check to this file.")


def run(options: argparse.Namespace) -> int:
    """Run the checks and print what they find; return the exit status."""
    checks = named(options.only)
    if options.list:
        for check in checks:
            print(f"{check.name:<19} {check.title}")  # noqa: T201  # a command prints
        return 0
    limit_s = _limit_s(options.limit_s)
    wanted = None if options.devices is None else parse_devices(options.devices)
    with ExitStack() as stack:
        file = None if options.json is None else stack.enter_context(_opened(options.json))
        return _run(options.only, limit_s, wanted, file)


def _opened(path: str) -> TextIO:
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"`--json` must be a file that can be written, got {path!r}: {error}.") from error


def _run(names: Sequence[str], limit_s: float | None, wanted: tuple[int, ...] | None, file: TextIO | None) -> int:
    # psutil is not needed for the list
    from lightning_hetero.command.check.runner import run_check
    from lightning_hetero.command.check.summary import summary

    results = [run_check(ENVIRONMENT, CPU, limit_s)]  # it says which devices there are
    found = results[0].finding.details
    devices = found.get("devices", [])
    broken = [device["number"] for device in devices if device["problem"]]
    layout = layout_of(wanted, [device["name"] for device in devices], broken)
    print(f"Checking {layout.title}.", flush=True)  # noqa: T201
    _tell(results[0], file)
    for check in named(names):
        if check != ENVIRONMENT:
            results.append(run_check(check, layout, limit_s))
            _tell(results[-1], file)
    text = summary(results, layout, found)
    print(f"\nTo report a problem, paste this into an issue:\n\n{text}", flush=True)  # noqa: T201
    return _FAILED if any(result.finding.outcome == "FAIL" for result in results) else 0


def _tell(result: Result, file: TextIO | None) -> None:
    from lightning_hetero.command.check.summary import json_line, line

    print(line(result), flush=True)  # noqa: T201
    if file is not None:
        file.write(json_line(result) + "\n")
        file.flush()


def _limit_s(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigurationError(
            f"`--limit-s` must be a positive number of seconds, got {text!r}. Leave it out for each check's own limit."
        )
    return seconds
