"""Run a script as a user does, in a process that has imported torch and Lightning already.

The process is forked from the server of ``harness``.  What the script starts itself it starts as ever: ``popen`` and
``spawn`` begin with a new interpreter.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.forkserver import ForkServer
from pathlib import Path

from harness import fork_context, start

TESTS = Path(__file__).parent


def run_script(
    script: Path,
    *arguments: str,
    folder: Path | None = None,
    timeout_s: float = 150.0,
    patience_s: float = 30.0,
    server: ForkServer | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in ``folder`` and return what it and its children printed.

    ``server`` is one to fork from that has imported something else.

    Raises:
        AssertionError: it has not ended after ``timeout_s``, or what it has started has not ``patience_s`` later.
    """
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        ours = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
        process = fork_context().Process(target=_run, args=(script, arguments, folder or Path.cwd(), ours, out, err))
        start(process, server)
        try:
            process.join(timeout_s)
            ended = process.exitcode is not None
            deadline = time.monotonic() + patience_s
            while (left := running_in_session(process.pid or 0)) and ended and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            while running := running_in_session(process.pid or 0):
                for number in running:
                    with suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)
                time.sleep(0.05)
            process.join()
        printed = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (out, err)]
        assert ended, f"{script.name} hangs:\n{printed[0]}\n{printed[1]}"
        assert not left, f"{script.name} has left processes: {left}\n{printed[0]}\n{printed[1]}"
    return subprocess.CompletedProcess([str(script), *arguments], process.exitcode or 0, *printed)


def running_in_session(session: int) -> list[int]:
    """Return the processes of a session that have not ended; those that have may still be listed."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its_session = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def print_to(out: Path, err: Path) -> None:
    """Let this process, and those that it starts, print to files."""
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), descriptor)


def _run(
    script: Path, arguments: tuple[str, ...], folder: Path, environment: dict[str, str], out: Path, err: Path
) -> None:
    os.setsid()
    with suppress(OSError):  # Linux may weigh sessions, whatever the priority of their processes is
        Path("/proc/self/autogroup").write_text(str(os.nice(0)), encoding="ascii")
    print_to(out, err)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[:] = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
