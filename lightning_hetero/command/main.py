"""Parse the command line, run the chosen command, and print usage errors on one line."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from lightning_hetero.command.check import command as check
from lightning_hetero.command.plan import command as plan
from lightning_hetero.command.probe import command as probe
from lightning_hetero.command.profile import command as profile
from lightning_hetero.command.report import command as report
from lightning_hetero.exceptions import HeteroError

__all__ = ["main"]

_USAGE_ERROR = 2
_INTERRUPTED = 130

_COMMANDS: dict[str, Any] = {"probe": probe, "profile": profile, "plan": plan, "check": check, "report": report}

_DESCRIPTION = """\
Tools for training with PyTorch Lightning on devices of different speeds, with the strategies hetero_ddp (which divides
the batch), hetero_fsdp (which also divides the parameters) and hetero_pipeline (which divides the layers): list the
devices of a machine, measure a model, predict how fast a cluster will train and with which strategy, check what a
training relies on, and report on a run.
"""
_EPILOG = "`lightning-hetero COMMAND --help` describes a command and its options."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line after the name of the program; by default that of this process.

    Returns:
        The exit status: 0 for success, 1 if a check failed, 2 for a usage error, 130 for Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="lightning-hetero", description=_DESCRIPTION, epilog=_EPILOG, add_help=False)
    _add_help(parser)
    parser.add_argument(
        "--version",
        action="version",
        version=f"lightning-hetero {version('lightning-hetero')}",
        help="Print the version and exit.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, module in _COMMANDS.items():
        description = inspect.cleandoc(module.__doc__ or "")
        command = commands.add_parser(
            name, help=description.partition("\n")[0], description=description, add_help=False
        )
        _add_help(command)
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    status = 0
    try:
        status = _COMMANDS[options.command].run(options) or 0
        sys.stdout.flush()
    except HeteroError as error:
        print(f"lightning-hetero {options.command}: error: {error}", file=sys.stderr)  # noqa: T201  # a command prints
        return _USAGE_ERROR
    except BrokenPipeError:
        # the reader of the pipe has closed it; without this, Python would complain again when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _add_help(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")
