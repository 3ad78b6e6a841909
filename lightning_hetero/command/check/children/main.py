"""Run one check on one rank, and write what it has found; the processes of a check begin here."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.finding import Finding, failed
from lightning_hetero.exceptions import RankFailedError

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1  # source: Linux, include/uapi/linux/prctl.h


def main() -> None:
    """Run the check that the command line describes; an exception ends this process as it would a user's script."""
    settings: dict[str, Any] = json.loads(sys.argv[2])
    _end_with(settings.pop("parent"))
    faulthandler.register(signal.SIGUSR1)  # where a rank hangs is worth more than that it does
    warnings.filterwarnings("ignore")
    call, folder = settings.pop("call"), Path(settings["folder"])
    module, _, name = call.partition(":")
    rank = Rank(**settings)
    try:
        finding = getattr(import_module(module), name)(rank)
    except BaseException as error:
        _write(folder, rank.rank, _failed(error))
        raise
    _write(folder, rank.rank, finding)


def _failed(error: BaseException) -> Finding:
    """Return the finding of a rank that raised; the whole traceback is in its output."""
    first = (str(error).splitlines() or [""])[0]
    return failed(f"{type(error).__name__}: {first}", because_of_peer=isinstance(error, RankFailedError))


def _end_with(parent: int) -> None:
    """Have the kernel end this process when the command that has started it is killed."""
    with suppress(OSError, AttributeError):  # other systems have no such call
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write(folder: Path, rank: int, finding: Finding) -> None:
    unfinished = folder / f".found-{rank}.json"
    unfinished.write_text(json.dumps(finding.to_dict()), encoding="utf-8")
    unfinished.rename(folder / f"found-{rank}.json")
