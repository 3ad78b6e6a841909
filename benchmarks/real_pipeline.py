"""Compare ways to train a transformer on two processors with quotas, through the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from scenarios import Scenario
from timing import QUIET, SKIPPED_STEPS, StepClock
from torch import Tensor, nn
from torch.utils.data import DataLoader
from workloads import WORKLOADS

from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy, LoadBalancer

__all__ = ["measure_real_pipeline"]

BLOCKS, WIDTH, LENGTH, MICRO_BATCHES = 8, 128, 64, 8
ROUNDS, STEPS = 3, 50
_LAST_STEPS = 10  # stages and shares have settled


class _Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)

    def forward(self, characters: Tensor) -> Tensor:
        embedded: Tensor = self.characters(characters) + self.position
        return embedded


class _Block(nn.Module):
    """A layer in which a character sees only those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.layer(hidden, src_mask=self.mask, is_causal=True)
        return output


class Characters(LightningModule):
    """Predicts the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(_Embedding(), *(_Block() for _ in range(BLOCKS)), nn.Linear(WIDTH, 256))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.model(batch[0]).transpose(1, 2), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def ways() -> dict[str, Callable[[], Any]]:
    """Return the strategies that are compared."""
    common: dict[str, Any] = {"num_microbatches": MICRO_BATCHES, "verbose": False}
    half = [1 + BLOCKS // 2]
    return {
        "equal stages": lambda: HeteroPipelineStrategy(splits=half, **common),
        "1f1b": lambda: HeteroPipelineStrategy(schedule="1f1b", **common),
        "gpipe": lambda: HeteroPipelineStrategy(schedule="gpipe", **common),
        "auto": lambda: HeteroPipelineStrategy(**common),
        "hetero_ddp": HeteroDDPStrategy,
    }


def measure_real_pipeline(scenario: Scenario) -> dict[str, Any]:
    """Return the seconds of a step for each way, and the limit by the times of the layers."""
    seconds: dict[str, list[float]] = {name: [] for name in ways()}
    limits: list[float] = []
    predicted: list[float] = []
    chosen: set[str] = set()
    for _ in range(ROUNDS):
        for name, strategy_of in ways().items():
            strategy = strategy_of()
            seconds[name].append(median(train(scenario, strategy)[-_LAST_STEPS:]))
            if name == "auto":
                findings = strategy.findings
                alone_s = [sum(layers) for layers in findings.costs.total_s]
                limits.append(MICRO_BATCHES / sum(1 / s for s in alone_s))
                predicted.append(findings.advice.step_s)
                layers = ":".join(map(str, findings.plan.layers_of_ranks))
                chosen.add(f"{findings.choice.name} {layers}")
            dist.barrier()
    return {
        "step_ms": {name: 1e3 * median(values) for name, values in seconds.items()},
        "limit_ms": 1e3 * median(limits),
        "predicted_ms": 1e3 * median(predicted),
        "chosen": sorted(chosen),
    }


def train(scenario: Scenario, strategy: Any) -> list[float]:
    """Train, and return the seconds of each step after the first ones."""
    clock, is_ddp = StepClock(), isinstance(strategy, HeteroDDPStrategy)
    callbacks = [LoadBalancer(verbose=False, record=False), clock] if is_ddp else [clock]
    # under hetero_ddp a loader's batch is that of each rank
    ranks = scenario.world_size
    size = scenario.batch_size // ranks if is_ddp else scenario.batch_size
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=STEPS + 1, callbacks=callbacks, **QUIET
    )
    data = WORKLOADS[scenario.workload]().samples(scenario.batch_size * (STEPS + 2))
    trainer.fit(Characters(), DataLoader(data, size))
    return clock.seconds()[SKIPPED_STEPS:]
