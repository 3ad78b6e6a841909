"""Start a job under torchrun or by hand, end it in time, and check what it has left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from faults.job import Fault, Job, train
from harness import fork_context, start
from profiles import THOROUGH
from scripts import print_to
from training import assert_close, parameters_after, reference_batches, reference_parameters

JOB = Path(__file__).with_name("job.py")
_MARK = "LIGHTNING_HETERO_TEST_RUN"
# arguments of a new process, or a function for one that is forked from the server of ``harness``
Command = list[str] | Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: Exit status.
        text: Output of the process and its children.
        seconds: Duration.
    """

    status: int
    text: str
    seconds: float


def job(folder: Path, devices: int, *faults: Fault, **settings: Any) -> str:
    """Return the argument of a job."""
    return json.dumps(asdict(Job(str(folder), devices, faults=[asdict(fault) for fault in faults], **settings)))


def torchrun(argument: str, *options: str, script: bool = THOROUGH) -> Command:
    """Return the command that runs a job under torchrun, as a ``script`` as users do, or in forked processes."""
    arguments = [*options, str(JOB), argument]
    return [sys.executable, "-m", "torch.distributed.run", *arguments] if script else partial(_torchrun, arguments)


def by_hand(argument: str, script: bool = THOROUGH) -> Command:
    """Return the command of one rank of a job, in an environment that says which."""
    return [sys.executable, str(JOB), argument] if script else partial(train, argument)


def one_node(ranks: int, argument: str, restarts: int = 0, **how: bool) -> Command:
    """Return the command for a single node."""
    return torchrun(argument, "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", **how)


def _torchrun(arguments: Sequence[str]) -> None:
    from faults import torchrun  # which imports torch

    torchrun.run(arguments)


def run(
    folder: Path, commands: Sequence[Command], environments: Sequence[dict[str, str]] = (), timeout_s: float = 250
) -> list[Ended]:
    """Run commands side by side until all have ended; fail if one hangs or leaves processes running."""
    token = uuid.uuid4().hex
    ours = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    path = os.pathsep.join([str(JOB.parents[1]), os.environ.get("PYTHONPATH", "")])
    ours |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", _MARK: token}
    outputs = [folder / f"output-{number}" for number in range(len(commands))]
    started = time.monotonic()
    with all_ended(token, folder):
        processes = []
        for number, command in enumerate(commands):
            environment = ours | (environments[number] if environments else {})
            processes.append(_start(command, environment, folder, outputs[number]))
        ended = []
        for number, wait in enumerate(processes):
            status = wait(timeout_s - (time.monotonic() - started))
            texts = [output.read_text(encoding="utf-8") for output in outputs if output.exists()]
            assert status is not None, "\n".join([f"command {number} hangs:", *texts])
            text = outputs[number].read_text(encoding="utf-8")
            ended.append(Ended(status, text, time.monotonic() - started))
    return ended


def _start(command: Command, environment: dict[str, str], folder: Path, output: Path) -> Callable[[float], int | None]:
    """Start a command; what is returned waits for some seconds, and returns the exit status or None."""
    if callable(command):
        forked = fork_context().Process(target=_call, args=(command, environment, folder, output))
        start(forked)

        def wait_for_forked(seconds: float) -> int | None:
            forked.join(max(seconds, 0.0))
            return forked.exitcode  # type: ignore[no-any-return]

        return wait_for_forked
    with output.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=folder)

    def wait(seconds: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(seconds, 0.0))
        return process.returncode

    return wait


def _call(command: Callable[[], None], environment: dict[str, str], folder: Path, output: Path) -> None:
    print_to(output, output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    command()


@contextmanager
def all_ended(token: str, folder: Path | None = None) -> Iterator[None]:
    """Fail if a process that was started in this context outlives it, and end that process in any case.

    Processes are known by a variable of the environment in which they were started, and those that were forked, whose
    environment is that of the server, by the directory in which they run.
    """
    try:
        yield
        deadline = time.monotonic() + 40  # ending Python with torch takes long on a busy machine
        while left := _processes_of(token, folder):
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.1)
    finally:
        for process in _processes_of(token, folder):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _processes_of(token: str, folder: Path | None) -> list[int]:
    # torchrun gives each rank a session of its own, so groups do not tell
    found = []
    mark = f"{_MARK}={token}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            in_folder = folder is not None and folder in [(at := (process / "cwd").readlink()), *at.parents]
            if in_folder or mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


# ---- what a job has left ---------------------------------------------------------------------------------------------


def found(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Return what each rank has found at the end."""
    return [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def ledger(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Return the entries of all ranks for each step, those of the last attempt only."""
    entries = []
    for path in folder.glob("ledger-*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # a rank was killed while it wrote; the step is repeated
                entries.append(json.loads(line))
    entries.sort(key=lambda entry: (entry["step"], entry["attempt"]))
    last: dict[int, list[dict[str, Any]]] = {}
    for step, of_step in groupby(entries, key=lambda entry: int(entry["step"])):
        group = list(of_step)
        last[step] = [entry for entry in group if entry["attempt"] == group[-1]["attempt"]]
    return last


def assert_whole(folder: Path, ranks: int, *, batch: int = 24, size: int = 250, epochs: int = 3) -> None:
    """Check that each sample of each epoch was trained on once, and that the training is an undisturbed one's."""
    expected = reference_batches(size, batch, epochs)
    last = ledger(folder)
    assert sorted(last) == list(range(len(expected)))
    for step, members in enumerate(expected):
        assert sorted(index for entry in last[step] for index in entry["samples"]) == sorted(members), f"step {step}"
    results = found(folder, ranks)
    reference = reference_parameters(size, batch, len(expected))
    for result in results:
        assert (result["steps"], result["world_size"]) == (len(expected), ranks)
        assert_close(result["parameters"], reference)


def assert_whole_pipeline(folder: Path, ranks: int, *, batch: int = 24, size: int = 250, epochs: int = 3) -> None:
    """Check that each sample of each epoch was trained on once, and that the stages learned what the batches teach."""
    last = ledger(folder)
    steps_an_epoch = -(-size // batch)
    assert sorted(last) == list(range(epochs * steps_an_epoch))
    batches = [last[step][0]["samples"] for step in sorted(last)]
    for epoch in range(epochs):
        of_epoch = batches[epoch * steps_an_epoch : (epoch + 1) * steps_an_epoch]
        assert sorted(chain.from_iterable(of_epoch)) == list(range(size)), f"epoch {epoch}"
    assert batches[0] != batches[steps_an_epoch]  # the epochs were shuffled, each in its own way
    reference = parameters_after(batches, size)
    for result in found(folder, ranks):
        assert (result["steps"], result["world_size"]) == (len(batches), ranks)
        assert_close(result["parameters"], reference)


def attempts(folder: Path) -> list[int]:
    """Return the first step of each attempt, in their order."""
    first: dict[float, int] = {}
    for path in folder.glob("ledger-*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                entry = json.loads(line)
                first[entry["attempt"]] = min(first.get(entry["attempt"], entry["step"]), entry["step"])
    return [first[attempt] for attempt in sorted(first)]
