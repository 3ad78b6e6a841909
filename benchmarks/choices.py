"""Compare what `lightning-hetero plan` says with `strategy: auto` with trainings under each strategy, on gloo.

Run it with

    python benchmarks/choices.py

Devices are virtual: a layer sleeps for each sample, in forward and backward passes, as long as it takes on a device of
its rank's speed, see `sleeping.py`.  As a user does, it first measures the model with `lightning-hetero profile`, on a
device of speed 1.  Each strategy then trains with the argument that `plan` prints for it.  A case with a link puts two
ranks on nodes of their own, see `link.py`, and is left out where that is not allowed.  Memory is not enforced: a
strategy that would not fit is not run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from link import available, linked_nodes

from lightning_hetero.command.plan.auto.choice import AutoCluster, AutoDevice, Candidate, predict_all
from lightning_hetero.command.plan.auto.model import Model
from lightning_hetero.command.plan.auto.model_file import read_profile

STEPS, LAST = 45, 10
WAIT_S = 180.0
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """Devices, a model and a link.

    Attributes:
        name: Name to show.
        speeds: Speed of each rank's device.
        batch: Number of samples of all ranks in a step.
        parameters: Number of parameters of each layer.
        memory_gb: Memory of each device, as declared; None if it is not.
        megabits_per_s: Bandwidth of the link between two ranks; None if they are on one machine.
    """

    name: str
    speeds: tuple[float, ...]
    batch: int = 96
    parameters: int = 10_000
    memory_gb: float | None = None
    megabits_per_s: int | None = None

    def cluster(self, model: Model) -> AutoCluster:
        """The same as `plan` reads it."""
        memory = None if self.memory_gb is None else 1e9 * self.memory_gb
        devices = tuple(AutoDevice(f"rank {i}", 1, speed, memory) for i, speed in enumerate(self.speeds))
        bandwidth = None if self.megabits_per_s is None else 1e6 * self.megabits_per_s
        return AutoCluster(devices, model, self.batch, bits_per_s=bandwidth)

    @property
    def environment(self) -> dict[str, str]:
        """What the model reads."""
        return {"SLEEPING_PARAMETERS": str(self.parameters), "SLEEPING_BATCH": str(self.batch)}


CASES = (
    Case("equal devices", (1, 1)),
    Case("1:2", (1, 2)),
    Case("1:2:4", (1, 2, 4), batch=112),
    Case("1:2, slow link", (1, 2), parameters=1_000_000, megabits_per_s=1000),
    Case("1:2, too large for one", (1, 2), parameters=100_000, memory_gb=0.009),
    Case("1:2, too large for one, slow link", (1, 2), parameters=250_000, memory_gb=0.023, megabits_per_s=200),
    Case("2:2:1:1, too large for one", (2, 2, 1, 1), batch=192, parameters=100_000, memory_gb=0.009),
)


def main() -> None:
    """Print a row per case and strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--argument", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", type=int, default=list(range(len(CASES))), help="numbers of cases")
    options = parser.parse_args()
    if options.rank is not None:
        train(CASES[int(options.run)], options.argument, options.rank)
        return
    print("| case | strategy | predicted ms | measured ms | |")
    print("|---|---|---|---|---|")
    for number in options.only:
        case = CASES[number]
        if case.megabits_per_s is None or available():
            compare(number, case)


def compare(number: int, case: Case) -> None:
    """Run all strategies that can train a case, and print them."""
    found = predict_all(case.cluster(profiled(case)))
    measured = {one.strategy: measure(number, case, one) for one in found.candidates if one.step_s is not None}
    best = min(measured, key=lambda strategy: measured[strategy])
    for one in found.candidates:
        if one.step_s is None:
            continue
        real_s = measured[one.strategy]
        marks = [f"{100 * (one.step_s / real_s - 1):+.1f} %"]
        marks += ["chosen"] * (one is found.chosen) + ["fastest"] * (one.strategy == best)
        print(
            f"| {case.name} | `{one.strategy}` | {1e3 * one.step_s:.0f} | {1e3 * real_s:.0f} | {', '.join(marks)} |",
            flush=True,
        )


def profiled(case: Case) -> Model:
    """Return what `lightning-hetero profile` measures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.json"
        command = [sys.executable, "-m", "lightning_hetero", "profile", "sleeping:Net", "--accelerator", "cpu"]
        subprocess.run(
            [*command, "--json", str(file)],
            env={**os.environ, **case.environment, "OMP_NUM_THREADS": "1"},
            cwd=_HERE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return read_profile(file)


def measure(number: int, case: Case, one: Candidate) -> float:
    """Return the seconds of a step."""
    with _places(case) as places:
        port = str(free_port())
        processes = []
        for rank, (command, address) in enumerate(places):
            environment = {
                **os.environ,
                **{"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": str(len(places)), "NODE_RANK": str(rank)},
                **{"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", "SLEEPING_SPEED": str(case.speeds[rank])},
                **case.environment,
            }
            run = ["--rank", str(rank), "--run", str(number), "--argument", str(one.argument)]
            arguments = [sys.executable, __file__, *run]
            processes.append(
                subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
            )
        try:
            outputs = [process.communicate(timeout=WAIT_S)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    return float(json.loads(outputs[0].splitlines()[-1]))


@contextmanager
def _places(case: Case) -> Iterator[list[tuple[list[str], str]]]:
    """Yield how each rank's command begins, and the address of rank 0."""
    if case.megabits_per_s is None:
        yield [([], "127.0.0.1")] * len(case.speeds)
        return
    with linked_nodes(case.megabits_per_s) as nodes:
        yield [(node.command(), nodes[0].address) for node in nodes]


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def train(case: Case, argument: str, rank: int) -> None:
    """Train on one rank with what `plan` says that a Trainer takes, and print the seconds of a step."""
    import logging
    import warnings

    import sleeping
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch import Trainer
    from timing import QUIET, StepClock

    import lightning_hetero

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ranks = len(case.speeds)
    # names as a script has them after `from lightning_hetero import *`
    strategy = eval(argument, {name: getattr(lightning_hetero, name) for name in lightning_hetero.__all__})
    clock = StepClock()
    balances = "Pipeline" not in argument and argument != '"ddp"'
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=ranks,
        plugins=[LightningEnvironment()],
        strategy=strategy,
        callbacks=[clock, *([lightning_hetero.LoadBalancer(verbose=False, record=False)] if balances else [])],
        **{**QUIET, "max_steps": STEPS, "max_epochs": -1, "limit_val_batches": 0},
    )
    size = case.batch if "Pipeline" in argument else -(-case.batch // ranks)
    trainer.fit(sleeping.Net(), sleeping.loader(case.batch * STEPS, size))
    if rank == 0:
        print(json.dumps(median(clock.seconds()[-LAST:])), flush=True)


if __name__ == "__main__":
    main()
