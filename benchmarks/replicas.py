"""Compare pipelines side by side with one pipeline of all ranks, and with replicas that are all treated alike."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from scenarios import Scenario
from timing import QUIET, StepClock
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.testing import SlowLayers

LAYERS, FEATURES, MICRO_BATCHES = 12, 128, 8
ROUNDS, STEPS = 3, 6
# Twelve layers take 2.4 MB with their gradients and the sums of these, so at most nine fit into a rank.
MEMORY_BYTES = 2_000_000


class Stack(LightningModule):
    """Equal layers, whose own work is small beside that of the emulated devices."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.mse_loss(self.model(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def ways(ranks: int) -> dict[str, Callable[[], HeteroPipelineStrategy]]:
    """Return the strategies that are compared. In the replicas of equals, slow ranks count as much as fast ones."""
    pairs = [[rank, rank + ranks // 2] for rank in range(ranks // 2)]
    common: dict[str, Any] = {"num_microbatches": MICRO_BATCHES, "verbose": False, "max_memory_bytes": MEMORY_BYTES}
    return {
        "one pipeline": lambda: HeteroPipelineStrategy(schedule="1f1b", **common),
        "one, planned": lambda: HeteroPipelineStrategy(schedule="auto", **common),
        "equals": lambda: HeteroPipelineStrategy(replicas=pairs, speeds=[1.0] * ranks, **common),
        "auto": lambda: HeteroPipelineStrategy(replicas="auto", **common),
    }


def measure_replicas(scenario: Scenario) -> dict[str, Any]:
    """Return the seconds of a step for each way, and what was predicted for replicas."""
    limit_s = LAYERS * scenario.seconds_per_sample * scenario.batch_size / sum(1 / f for f in scenario.factors)
    seconds: dict[str, list[float]] = {name: [] for name in ways(scenario.world_size)}
    predicted: list[float] = []
    found: set[str] = set()
    for _ in range(ROUNDS):
        for name, strategy_of in ways(scenario.world_size).items():
            strategy = strategy_of()
            seconds[name].append(median(train(scenario, strategy)))
            if name == "auto":
                assert strategy.replica_findings is not None
                predicted.append(strategy.replica_findings.solution.step_s)
                found.add(described(strategy))
            dist.barrier()
    return {
        "limit_s": limit_s,
        "measured": {name: limit_s / median(values) for name, values in seconds.items()},
        "step_ms": {name: 1e3 * median(values) for name, values in seconds.items()},
        "predicted_ms": 1e3 * median(predicted),
        "found": sorted(found),
    }


def train(scenario: Scenario, strategy: HeteroPipelineStrategy) -> list[float]:
    """Train, and return the seconds of each step but the first."""
    clock = StepClock()
    slow = SlowLayers(list(scenario.factors), scenario.seconds_per_sample)
    trainer = Trainer(
        accelerator="cpu", devices=scenario.world_size, strategy=strategy, max_steps=STEPS, callbacks=[slow, clock],
        **QUIET,
    )  # fmt: skip
    data = TensorDataset(torch.randn(scenario.batch_size * (STEPS + 1), FEATURES))
    trainer.fit(Stack(), DataLoader(data, scenario.batch_size))
    return clock.seconds()


def described(strategy: HeteroPipelineStrategy) -> str:
    """Return the ranks of the stages of each replica, their layers, and the replica's part of the batch."""
    assert strategy.replica_plan is not None
    total = sum(replica.share for replica in strategy.replica_plan.replicas)
    return " and ".join(
        f"ranks {', '.join(str(one.ranks[rank]) for rank in one.stages.ranks)} with layers"
        f" {':'.join(str(len(one.stages.layers(stage))) for stage in range(one.stages.num_stages))}"
        f" ({one.share / total:.0%})"
        for one in strategy.replica_plan.replicas
    )
