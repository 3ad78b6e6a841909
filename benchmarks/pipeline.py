"""Compare ways to divide layers over devices of known speed, and measure what the Trainer adds to a schedule."""

from __future__ import annotations

import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from scenarios import Scenario
from timing import QUIET, SKIPPED_STEPS, StepClock, without_launcher
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroPipelineStrategy, PipelineRecorder
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stage_solver import uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts
from lightning_hetero.testing import SlowLayers

LAYERS, FEATURES, MICRO_BATCHES = 12, 16, 8
ROUNDS, STEPS, TRAINER_STEPS = 2, 6, 120


class Stack(LightningModule):
    """Equal layers whose own work is negligible."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.mse_loss(self.model(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(
    scenario: Scenario, strategy: Any, ranks: int, steps: int, factors: list[float], *callbacks: Callback
) -> list[float]:
    """Train, and return the seconds of each step but the first."""
    clock = StepClock()
    slow = [SlowLayers(factors, scenario.seconds_per_sample)] if scenario.seconds_per_sample else []
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_steps=steps,
        callbacks=[*slow, *callbacks, clock],
        **QUIET,
    )
    data = TensorDataset(torch.randn(scenario.batch_size * (steps + 1), FEATURES))
    trainer.fit(Stack(), DataLoader(data, scenario.batch_size))
    return clock.seconds()


def measure_splits(scenario: Scenario) -> dict[str, Any]:
    """Return the step times of equal stages, of the stages that were found, and of the fastest device alone."""
    factors, ranks = list(scenario.factors), scenario.world_size
    uniform = uniform_stages(LAYERS, ranks)
    found: dict[str, list[float]] = {"uniform": [], "auto": [], "alone": []}
    plans, predicted = [], []
    recorders = {name: PipelineRecorder(STEPS - 1) for name in ("uniform", "auto")}
    for _ in range(ROUNDS):
        fixed = HeteroPipelineStrategy(splits=list(uniform.ends[:-1]), num_microbatches=MICRO_BATCHES)
        found["uniform"] += train(scenario, fixed, ranks, STEPS, factors, recorders["uniform"])
        strategy = HeteroPipelineStrategy(num_microbatches=MICRO_BATCHES, schedule="1f1b", verbose=False)
        found["auto"] += train(scenario, strategy, ranks, STEPS, factors, recorders["auto"])
        assert strategy.findings is not None
        plans.append(strategy.findings.plan)
        predicted.append(strategy.findings.advice.step_s)
        with without_launcher():  # all ranks run at the same time; only the fastest device's time counts
            found["alone"] += train(scenario, "auto", 1, STEPS, [min(factors)])
        dist.barrier()
    # The plan that would be best if only the layers took time.
    layer_s = scenario.seconds_per_sample * scenario.batch_size / MICRO_BATCHES
    costs = LayerCosts.of_speeds([(layer_s / 3, layer_s * 2 / 3)] * LAYERS, [1 / f for f in factors])
    optimum = plan_pipeline(costs, MICRO_BATCHES)
    seconds = {name: median(values) for name, values in found.items()}
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        "optimum_s": simulate_pipeline(costs.of_stages(optimum), MICRO_BATCHES).step_s,
        "optimum_plan": optimum.layers_of_ranks,
        "plans": [plan.layers_of_ranks for plan in plans],
        "predicted_s": median(predicted),
        "timelines": {name: passes_of(recorder) for name, recorder in recorders.items()},
        "spread": (max(found["auto"]) - min(found["auto"])) / seconds["auto"],
    }


def passes_of(recorder: PipelineRecorder) -> list[dict[str, Any]]:
    """Return the passes of the recorded step."""
    assert recorder.timeline is not None
    return [asdict(one) for one in recorder.timeline.passes]


def measure_trainer(scenario: Scenario) -> dict[str, Any]:
    """Return the milliseconds of a step through the Trainer, and of torch's schedule in a plain loop."""
    split = list(uniform_stages(LAYERS, scenario.world_size).ends[:-1])
    through, bare = [], []
    for _ in range(ROUNDS):
        strategy = HeteroPipelineStrategy(splits=split, num_microbatches=MICRO_BATCHES // 2)
        steps = train(scenario, strategy, scenario.world_size, TRAINER_STEPS, [])
        through.append(1e3 * median(steps[SKIPPED_STEPS:]))
        bare.append(1e3 * bare_schedule(scenario))
    return {
        "through": median(through),
        "bare": median(bare),
        "added": [a - b for a, b in zip(through, bare, strict=True)],
    }


def bare_schedule(scenario: Scenario) -> float:
    """Return the median step time with the same stages, micro-batches and optimiser, but with torch alone."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ends = (0, *uniform_stages(LAYERS, size).ends)
    layers = list(Stack().model)[ends[rank] : ends[rank + 1]]
    example = torch.empty(scenario.batch_size // (MICRO_BATCHES // 2), FEATURES, device="meta", requires_grad=rank > 0)
    module = nn.Sequential(*layers)
    output = torch.empty_like(example).requires_grad_()
    stage = PipelineStage(module, rank, size, torch.device("cpu"), input_args=(example,), output_args=(output,))
    schedule = Schedule1F1B(stage, MICRO_BATCHES // 2, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    batch, seconds = torch.randn(scenario.batch_size, FEATURES), []
    for _ in range(TRAINER_STEPS):
        start_s = time.perf_counter()
        optimizer.zero_grad()
        schedule.step(
            *((batch,) if rank == 0 else ()), target=batch if rank == size - 1 else None, return_outputs=False
        )
        optimizer.step()
        dist.barrier()  # training that logs its loss also waits for the last stage
        seconds.append(time.perf_counter() - start_s)
    return median(seconds[SKIPPED_STEPS:])
