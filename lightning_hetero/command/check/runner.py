"""Run one check in processes of its own, with a time limit, and leave none of them behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import lightning_hetero
from lightning_hetero.command.check.catalogue import Check
from lightning_hetero.command.check.ended import Ended
from lightning_hetero.command.check.finding import Finding, failed, skipped
from lightning_hetero.command.check.layout import Layout, free_port

__all__ = ["Result", "run_check"]

# Once a rank has failed, the others wait for it; they are given this long to say something.
_PATIENCE_S = 10.0
_PAUSE_S = 0.05
_LINES_OF_OUTPUT = 60
# The time in which ranks that hang write where.
_TRACEBACK_S = 1.0

# The copy of this package that runs the command, whatever else is installed. Ranks run in a folder of their own.
_START = """\
import sys
sys.path.insert(0, sys.argv[1])
import lightning_hetero
del sys.path[0]
from lightning_hetero.command.check.children.main import main
main()
"""


@dataclass(frozen=True)
class Result:
    """How a check went.

    Attributes:
        check: The check.
        finding: What it found.
        seconds: Duration.
        output: Last lines of what its ranks have printed, if it failed.
    """

    check: Check
    finding: Finding
    seconds: float = 0.0
    output: str = ""


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    folder: Path
    ended_s: float | None = None
    descendants: set[psutil.Process] = field(default_factory=set)

    def look(self) -> None:
        """Note whether the process has ended, and its children while it has any."""
        if self.ended_s is None and self.process.poll() is not None:
            self.ended_s = time.time()
        if self.ended_s is None:
            with suppress(psutil.Error):
                self.descendants |= set(psutil.Process(self.process.pid).children(recursive=True))

    @property
    def output_file(self) -> Path:
        return self.folder / f"output-{self.number}.txt"


def run_check(check: Check, layout: Layout, limit_s: float | None = None) -> Result:
    """Run a check.

    Args:
        check: The check.
        layout: Where its ranks run.
        limit_s: Seconds after which it has failed; the check's own limit by default.
    """
    reason = check.why_not(layout)
    if reason:
        return Result(check, skipped(reason))
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lightning-hetero-check-") as folder:
        ranks: list[_Rank] = []
        try:
            finding = _found(check, layout, limit_s or check.limit_s, Path(folder), ranks)
        finally:
            _end(ranks)
        output = _output(ranks) if finding.outcome == "FAIL" else ""
    return Result(check, finding, time.monotonic() - begin_s, output)


def _found(check: Check, layout: Layout, limit_s: float, folder: Path, ranks: list[_Rank]) -> Finding:
    port, count = free_port(), 1 if check.alone else layout.ranks
    for number in range(count):
        ranks.append(_start(check, layout, folder, number, port))  # noqa: PERF401  # all that run, also if one does not
    late = _wait(check, ranks, limit_s)
    if late:
        _ask_where(ranks)
    ended = [_ended(rank) for rank in ranks]
    if late and (check.judge is not None or not any(one.status for one in ended)):
        return failed(f"rank {', '.join(map(str, late))} had not ended after {limit_s:g} s", late=late)
    return check.judge(ended) if check.judge else _worst([one for one in ended if one.rank not in late])


def _start(check: Check, layout: Layout, folder: Path, number: int, port: int) -> _Rank:
    settings = {
        "call": check.call,
        "folder": str(folder),
        "parent": os.getpid(),
        **layout.of_rank(number, nccl=check.nccl),
    }
    package = Path(lightning_hetero.__file__).parents[1]
    with (folder / f"output-{number}.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(package), json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=layout.environment(number, port, os.environ),
            start_new_session=True,  # Ctrl-C is for this process, which then ends them
        )
    return _Rank(number, process, folder)


def _wait(check: Check, ranks: Sequence[_Rank], limit_s: float) -> list[int]:
    """Wait until all ranks have ended that should; return the numbers of those that have not in time."""
    deadline = time.monotonic() + limit_s
    awaited = ranks[:-1] if check.last_stays else ranks
    while True:
        for rank in ranks:
            rank.look()
        missing = [rank.number for rank in awaited if rank.ended_s is None]
        if not missing:
            return []
        if check.judge is None and any(rank.process.returncode for rank in ranks):
            deadline = min(deadline, time.monotonic() + _PATIENCE_S)
        if time.monotonic() > deadline:
            return missing
        time.sleep(_PAUSE_S)


def _ask_where(ranks: Sequence[_Rank]) -> None:
    """Have ranks that run write a traceback to their output."""
    for rank in ranks:
        if rank.ended_s is None:
            with suppress(ProcessLookupError):
                rank.process.send_signal(signal.SIGUSR1)
    time.sleep(_TRACEBACK_S)


def _ended(rank: _Rank) -> Ended:
    finding = fault_s = None
    with suppress(OSError, ValueError):
        finding = Finding.from_dict(json.loads((rank.folder / f"found-{rank.number}.json").read_text("utf-8")))
    with suppress(OSError, ValueError):
        fault_s = float((rank.folder / f"fault-{rank.number}").read_text("utf-8"))
    text = rank.output_file.read_text("utf-8", "replace")
    return Ended(rank.number, rank.process.returncode, rank.ended_s, text, finding, fault_s)


def _worst(ended: Sequence[Ended]) -> Finding:
    """Return what the rank has found that failed by itself, or else the one with the largest figure."""
    found = [one.finding for one in ended if one.finding is not None]
    failures = [finding for finding in found if finding.outcome == "FAIL"]
    if failures:
        return min(failures, key=lambda finding: bool(finding.details.get("because_of_peer")))
    for one in ended:
        if one.finding is None or one.status:
            return failed(f"rank {one.rank} ended with exit status {one.status}")
    skips = [finding for finding in found if finding.outcome == "SKIP"]
    return skips[0] if skips else max(found, key=lambda finding: finding.figure or 0.0)


def _end(ranks: Sequence[_Rank]) -> None:
    """End every process that a check has started, and its children, also if they are stopped."""
    for rank in ranks:
        rank.look()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, signal.SIGKILL)  # the session of the rank, also where the rank has ended
        for process in rank.descendants:
            with suppress(psutil.Error):  # it compares times of creation, so it does not meet another process
                process.kill()
    for rank in ranks:
        rank.process.wait()


def _output(ranks: Sequence[_Rank]) -> str:
    texts = []
    for rank in ranks:
        lines = rank.output_file.read_text("utf-8", "replace").splitlines()[-_LINES_OF_OUTPUT:]
        texts.append("\n".join([f"rank {rank.number}:", *lines]))
    return "\n".join(texts)
