"""Train on two unequal ranks that share one NVIDIA card, each with a part of its multiprocessors.

Run where ``nvidia-cuda-mps-control`` is installed:

    python benchmarks/one_card.py --percent 30 60

NVIDIA's Multi-Process Service gives each rank its part of the multiprocessors, so the ranks are real GPUs of unequal
speed, with one memory and one memory bus.  NCCL refuses two ranks on one card of one host: each gets a host of its own,
and they talk through sockets.  What is measured is the time of steps under each strategy, and what each rank took for
its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning_hetero.command.check.layout import Layout, free_port

_STEPS, _LAST = 60, 20
_WAIT_S = 120.0


def main() -> None:
    """Start the service, and run the cases one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--percent", nargs="+", type=int, default=[30, 60], help="part of the card per rank, in percent"
    )
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), help="cases to run")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        _run(given.case, given.rank, len(given.percent))
        return
    with tempfile.TemporaryDirectory() as folder:
        service = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env={**os.environ, **service}, check=True)
        try:
            for case in given.only:
                _start(case, given.percent, service)
        finally:
            quit_service = ["nvidia-cuda-mps-control"]
            subprocess.run(quit_service, input=b"quit\n", env={**os.environ, **service}, check=False)


def _start(case: str, percents: list[int], service: dict[str, str]) -> None:
    card, port = Layout("cuda", devices=(0,), names=("",), ranks=len(percents)), free_port()
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank, percent in enumerate(percents):
        own = {**card.environment(rank, port, os.environ), **service, "PYTHONPATH": path}
        own["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(percent)
        command = [sys.executable, __file__, "--percent", *map(str, percents), "--rank", str(rank), "--case", case]
        processes.append(subprocess.Popen(command, env=own))
    try:
        for process in processes:
            process.wait(_WAIT_S)
    except subprocess.TimeoutExpired:
        print(f"{case}: not finished after {_WAIT_S:g} s", flush=True)
    finally:
        for process in processes:
            process.kill()


def _run(name: str, rank: int, ranks: int) -> None:
    import logging
    import warnings

    import torch
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
    from lightning.pytorch.strategies import DDPStrategy
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy, LoadBalancer

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(7, verbose=False)

    class Convolutions(LightningModule):
        """Much computation for few parameters: ranks on one card have no fast link."""

        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = [nn.Conv2d(3, 256, 3, 2, 1)]
            for _ in range(8):
                layers += [nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()]
            self.model = nn.Sequential(*layers)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            images = torch.randn(len(batch), 3, 112, 112, device=self.device)
            loss: Tensor = self.model(images).float().square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    class Wide(LightningModule):
        """A stack of equal layers that compute much for what crosses between two of them: sockets are slow."""

        width, inner = 2048, 32768

        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(
                *(
                    nn.Sequential(self.linear(self.width, self.inner), nn.GELU(), self.linear(self.inner, self.width))
                    for _ in range(12)
                )
            )

        @staticmethod
        def linear(inputs: int, outputs: int) -> nn.Linear:
            layer: nn.Linear = torch.nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
            rows = torch.empty(64, inputs).uniform_(-1, 1) * (3 / inputs) ** 0.5  # drawing all of them takes minutes
            with torch.no_grad():
                layer.weight.copy_(rows.repeat(outputs // 64, 1))
            return layer

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(self.inputs(len(batch))).float().square().mean()
            return loss

        def inputs(self, count: int) -> Tensor:
            return torch.randn(count, self.width, device=self.device, dtype=next(self.parameters()).dtype)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    class Clock(Callback):
        """Times the last steps together; the host waits for the device at their ends only."""

        begin_s = seconds = 0.0

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in (_STEPS - _LAST, _STEPS):
                torch.cuda.synchronize()
                self.begin_s, self.seconds = time.perf_counter(), (time.perf_counter() - self.begin_s) / _LAST

    kind, options = CASES[name]
    callbacks: list[Any] = []
    strategy: Any
    if kind == "ddp":
        strategy = DDPStrategy(process_group_backend="nccl")
    elif kind == "hetero_ddp":
        strategy = HeteroDDPStrategy(process_group_backend="nccl", **options)
        callbacks.append(LoadBalancer(record=False))
    else:
        strategy = HeteroPipelineStrategy(process_group_backend="nccl", num_microbatches=8, **options)
    clock = Clock()
    is_pipeline = kind == "hetero_pipeline"
    module = Wide() if is_pipeline else Convolutions()
    batch_size = 8192 if is_pipeline else 64
    trainer = Trainer(
        accelerator="gpu", devices=1, num_nodes=ranks, strategy=strategy, callbacks=[*callbacks, clock],
        plugins=[LightningEnvironment()], precision="bf16-true" if is_pipeline else "bf16-mixed", max_steps=_STEPS,
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(range(batch_size * _STEPS * (1 if is_pipeline else ranks)), batch_size))
    if rank == 0:
        found: dict[str, Any] = {"case": name, "step_ms": round(1e3 * clock.seconds, 2)}
        if kind == "hetero_ddp":
            balancer = callbacks[0]
            found["samples"] = list(strategy.plan_schedule.plans[-1].samples)
            found["own_ms_before"] = [round(1e3 * window.own_s, 2) for window in balancer.windows_before]
            found["own_ms_after"] = [round(1e3 * window.own_s, 2) for window in balancer.windows_after]
        if is_pipeline:
            found["layers"] = str(strategy.plan)
            if strategy.findings is not None:
                advice = strategy.findings.advice
                alone_s = [sum(layers) for layers in strategy.findings.costs.total_s]
                bound_s = strategy.num_microbatches / sum(1 / seconds for seconds in alone_s)
                found["predicted_ms"], found["bound_ms"] = round(1e3 * advice.step_s, 2), round(1e3 * bound_s, 2)
                found["alone_ms"] = [round(1e3 * strategy.num_microbatches * seconds, 2) for seconds in alone_s]
        print(json.dumps(found), flush=True)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "hetero_ddp": ("hetero_ddp", {}),
    "hetero_pipeline, equal stages": ("hetero_pipeline", {"splits": [6], "watch_steps": 0}),
    "hetero_pipeline, 1f1b": ("hetero_pipeline", {"schedule": "1f1b"}),
    "hetero_pipeline": ("hetero_pipeline", {}),
}

if __name__ == "__main__":
    main()
