"""Take the command line apart, and turn errors of usage into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from lightning_hetero.command.plan import command as plan
from lightning_hetero.command.probe import command as probe
from lightning_hetero.command.report import command as report
from lightning_hetero.exceptions import HeteroError

__all__ = ["main"]

_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line behind the command's name; that of this process by default.

    Returns:
        The exit status: 0, 2 for an error of usage, 130 for Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-hetero", description="See what mixed hardware can do, and what a training made of it."
    )
    parser.add_argument("--version", action="version", version=f"lightning-hetero {version('lightning-hetero')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in (("probe", probe), ("plan", plan), ("report", report)):
        summary = (module.__doc__ or "").splitlines()[0].rstrip(".")
        module.add_arguments(commands.add_parser(name, help=summary, description=f"{summary}."))
    options = parser.parse_args(arguments)
    try:
        run = {"probe": probe.run, "plan": plan.run, "report": report.run}[options.command]
        run(options)
        sys.stdout.flush()
    except HeteroError as error:
        print(f"lightning-hetero {options.command}: error: {error}", file=sys.stderr)  # noqa: T201  # a command prints
        return _USAGE_ERROR
    except BrokenPipeError:
        # the reader of a pipe has seen enough; Python must not complain again when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0
