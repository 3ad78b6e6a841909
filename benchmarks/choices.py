"""Compare what `lightning-hetero plan` says with `strategy: auto` with trainings under each strategy, on gloo.

Run it with

    python benchmarks/choices.py

Devices are virtual: a layer sleeps for each sample, in forward and backward passes, as long as it takes on a device of
its rank's speed.  A pipeline gets the stages that were predicted.  A case with a link puts two ranks on nodes of their
own, see `link.py`, and is left out where that is not allowed.  Memory is not enforced: a strategy that would not fit is
not run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from link import available, linked_nodes

from lightning_hetero.command.plan.auto.choice import AutoCluster, AutoDevice, Candidate, predict_all
from lightning_hetero.command.plan.auto.model import Model, ModelLayer
from lightning_hetero.command.plan.pipeline.pipeline_cluster import predict_pipeline

LAYERS, STEPS, LAST = 12, 45, 10
FORWARD_S = 0.0002  # per sample and layer; twice that backward
WAIT_S = 180.0


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

    @property
    def cluster(self) -> AutoCluster:
        """The same as `plan` reads it."""
        layer = ModelLayer(
            FORWARD_S, 2 * FORWARD_S, parameter_bytes=4 * self.parameters, activation_bytes=1e3, output_bytes=256
        )
        memory = None if self.memory_gb is None else 1e9 * self.memory_gb
        devices = tuple(AutoDevice(f"rank {i}", 1, speed, memory) for i, speed in enumerate(self.speeds))
        bandwidth = None if self.megabits_per_s is None else 1e6 * self.megabits_per_s
        return AutoCluster(devices, Model((layer,) * LAYERS, 0.0), self.batch, bits_per_s=bandwidth)


CASES = (
    Case("equal devices", (1, 1)),
    Case("1:2", (1, 2)),
    Case("1:2:4", (1, 2, 4), batch=112),
    Case("1:2, slow link", (1, 2), parameters=1_000_000, megabits_per_s=1000),
    Case("1:2, too large for one", (1, 2), parameters=100_000, memory_gb=0.009),
    Case("1:2, too large for one, slow link", (1, 2), parameters=250_000, memory_gb=0.023, megabits_per_s=200),
)


def main() -> None:
    """Print a row per case and strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", type=int, default=list(range(len(CASES))), help="numbers of cases")
    options = parser.parse_args()
    if options.rank is not None:
        number, strategy = options.run
        train(CASES[int(number)], strategy, options.rank)
        return
    print("| case | strategy | predicted ms | measured ms | |")
    print("|---|---|---|---|---|")
    for number in options.only:
        case = CASES[number]
        if case.megabits_per_s is None or available():
            compare(number, case)


def compare(number: int, case: Case) -> None:
    """Run all strategies that can train a case, and print them."""
    found = predict_all(case.cluster)
    measured = {one.strategy: measure(number, case, one) for one in found.candidates if _is_run(one)}
    best = min(measured, key=lambda strategy: measured[strategy])
    for one in found.candidates:
        if not _is_run(one):
            continue
        real_s = measured[one.strategy]
        marks = [f"{100 * (one.step_s / real_s - 1):+.1f} %"]
        marks += ["chosen"] * (one is found.chosen) + ["fastest"] * (one.strategy == best)
        print(
            f"| {case.name} | `{one.strategy}` | {1e3 * one.step_s:.0f} | {1e3 * real_s:.0f} | {', '.join(marks)} |",
            flush=True,
        )


def _is_run(one: Candidate) -> bool:
    return one.step_s is not None and one.strategy != "replicas"


def measure(number: int, case: Case, one: Candidate) -> float:
    """Return the seconds of a step."""
    with _places(case) as places:
        port = str(free_port())
        processes = []
        for rank, (command, address) in enumerate(places):
            environment = {
                **os.environ,
                **{"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": str(len(places)), "NODE_RANK": str(rank)},
                **{"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"},
            }
            arguments = [sys.executable, __file__, "--rank", str(rank), "--run", str(number), one.strategy]
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


def train(case: Case, name: str, rank: int) -> None:
    """Train on one rank, and print the seconds of a step."""
    import logging
    import warnings

    import torch
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy
    from timing import QUIET, StepClock
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_hetero import HeteroDDPStrategy, HeteroFSDPStrategy, HeteroPipelineStrategy, LoadBalancer

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(1)
    seconds = FORWARD_S / case.speeds[rank]

    class Sleeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
            time.sleep(seconds * len(x))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
            time.sleep(2 * seconds * len(gradients[0]))
            return gradients[0].clone()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(case.parameters))

        def forward(self, x: Tensor) -> Tensor:
            """Return the input, after a sleep; the weights count, and take little time."""
            slept: Tensor = Sleeps.apply(x)  # type: ignore[no-untyped-call]
            return slept + self.weight.mean()

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(*(Layer() for _ in range(LAYERS)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            """Return the loss."""
            loss: Tensor = self.model(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            """Return SGD."""
            return torch.optim.SGD(self.parameters(), 0.01)

    ranks = len(case.speeds)
    splits = [stage.first_layer for stage in predict_pipeline(case.cluster.of_stages).stages[1:]]
    strategies: dict[str, Any] = {
        "ddp": DDPStrategy,
        "hetero_ddp": HeteroDDPStrategy,
        "hetero_fsdp": lambda: HeteroFSDPStrategy(shard_weights=[1.0] * ranks, units=[Layer]),
        "hetero_pipeline": lambda: HeteroPipelineStrategy(splits, num_microbatches=8),
    }
    balances = name in ("hetero_ddp", "hetero_fsdp")
    clock = StepClock()
    options: dict[str, Any] = {**QUIET, "max_steps": STEPS, "max_epochs": -1, "limit_val_batches": 0}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=ranks,
        plugins=[LightningEnvironment()],
        strategy=strategies[name](),
        callbacks=[clock, *([LoadBalancer(verbose=False, record=False)] if balances else [])],
        **options,
    )
    size = case.batch if name == "hetero_pipeline" else -(-case.batch // ranks)
    trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(case.batch * STEPS, 64)), size))
    if rank == 0:
        print(json.dumps(median(clock.seconds()[-LAST:])), flush=True)


if __name__ == "__main__":
    main()
