"""Measure one scenario; every rank runs this under torchrun, rank zero writes what was found.

    torchrun --nproc-per-node 2 benchmarks/scenario.py "1:2" result.json

Everything that is compared runs in the same processes, in turn: a machine that becomes slower makes all slower.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from scenarios import SCENARIOS, Scenario
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.balance.batch_solver import predicted_step_s, solve_batch
from lightning_hetero.balance.types import BatchPlan, StepTime
from lightning_hetero.testing import SlowDown

ROUNDS = 3
STEPS_A_BLOCK = 10
SKIPPED_STEPS = 2
DDP_BLOCKS = 2
COLD_STEPS = 100


class Network(LightningModule):
    """Small, so that the devices' speed is that of the scenario and not of this machine."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class StepClock(Callback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the length of each step but the first."""
        return [b - a for a, b in pairwise(self.ends)]


class Sweep(Callback):
    """Follows one fixed split after the other, each for a block of steps."""

    def __init__(self, plans: Sequence[BatchPlan]) -> None:
        self.plans = plans

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Change to the next split at the end of a block."""
        block, step = divmod(trainer.global_step, STEPS_A_BLOCK)
        strategy = trainer.strategy
        if step == 0 and block < len(self.plans) and isinstance(strategy, HeteroDDPStrategy):
            strategy.change_plan(trainer.global_step, self.plans[block])


class Throttle(Callback):
    """Makes rank 0 twice as slow, and quick again."""

    def __init__(self, scenario: Scenario, slow_down: SlowDown) -> None:
        self.changes = {scenario.throttled_at: 2.0, scenario.recovered_at: 0.5}
        self.slow_down = slow_down

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Change the speed at two steps."""
        self.slow_down.factors[0] *= self.changes.get(trainer.global_step, 1.0)


def fit(scenario: Scenario, strategy: Any, steps: int, *callbacks: Callback, slow_down: SlowDown | None = None) -> None:
    """Train for some steps."""
    seed_everything(0, verbose=False)
    world_size = scenario.world_size
    size = world_size * scenario.batch_size * (steps + 1)
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_steps=steps,
        callbacks=[slow_down or slowed(scenario), *callbacks],
        **QUIET,
    )
    data = TensorDataset(torch.randn(size, 32), torch.randn(size, 1))
    trainer.fit(Network(), DataLoader(data, batch_size=scenario.batch_size))


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def slowed(scenario: Scenario) -> SlowDown:
    """Return the devices of the scenario."""
    return SlowDown(list(scenario.factors), scenario.seconds_per_sample, scenario.overhead_s)


@contextmanager
def without_launcher() -> Iterator[None]:
    """Let Lightning believe that this process is alone."""
    hidden = {k: os.environ.pop(k) for k in list(os.environ) if k.startswith("TORCHELASTIC") or k in LAUNCHER}
    try:
        yield
    finally:
        os.environ.update(hidden)


LAUNCHER = {"LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"}


def samples_per_s_alone(scenario: Scenario, samples: int, steps: int = 25) -> float:
    """Return what this rank processes alone, in mini-batches of ``samples``."""
    factor = scenario.factors[dist.get_rank()]
    clock = StepClock()
    with without_launcher():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            callbacks=[SlowDown([factor], scenario.seconds_per_sample, scenario.overhead_s), clock],
            **QUIET,
        )
        data = TensorDataset(torch.randn(samples * steps, 32), torch.randn(samples * steps, 1))
        trainer.fit(Network(), DataLoader(data, batch_size=samples))
    return samples / median(clock.seconds()[SKIPPED_STEPS:])


def neighbours(plan: BatchPlan, factors: Sequence[float]) -> list[BatchPlan]:
    """Return splits around ``plan``: samples move between fast and slow ranks, up to a quarter of the slow ones'."""
    order = sorted(range(len(factors)), key=lambda rank: factors[rank])
    half = len(order) // 2
    fast, slow = order[:half], order[-half:]
    found = {plan.samples: plan}
    for part in (-0.25, -0.12, -0.06, 0.06, 0.12, 0.25):
        samples = list(plan.samples)
        for a, b in zip(fast, reversed(slow), strict=True):
            moved = min(max(round(part * plan.samples[b]), 1 - samples[a]), samples[b] - 1) or (1 if part > 0 else -1)
            samples[a] += moved
            samples[b] -= moved
        found.setdefault(tuple(samples), BatchPlan(tuple(samples)))
    return list(found.values())


def rates(clock: StepClock, batch: int, blocks: int) -> list[float]:
    """Return samples/s of each block of steps, by its median step."""
    seconds = [0.0, *clock.seconds()]
    return [batch / median(seconds[b * STEPS_A_BLOCK + SKIPPED_STEPS : (b + 1) * STEPS_A_BLOCK]) for b in range(blocks)]


def measure(scenario: Scenario) -> dict[str, Any]:
    """Return everything that is compared; samples/s unless the name says otherwise."""
    batch = scenario.world_size * scenario.batch_size
    balancer, clock = LoadBalancer(verbose=False), StepClock()
    fit(scenario, HeteroDDPStrategy(), COLD_STEPS + 1, balancer, clock)
    cold = clock.seconds()
    equal = BatchPlan((scenario.batch_size,) * scenario.world_size)
    tuned = balancer.changes[-1][1] if balancer.changes else equal
    own_s = predicted_step_s(balancer.step_times, tuned)
    plans = [*neighbours(tuned, scenario.factors), tuned]
    by_plan: dict[BatchPlan, list[float]] = {plan: [] for plan in plans}
    ddp: list[float] = []
    for _ in range(ROUNDS):
        clock = StepClock()
        fit(scenario, "ddp", STEPS_A_BLOCK * DDP_BLOCKS, clock)
        ddp += rates(clock, batch, DDP_BLOCKS)
        clock = StepClock()
        shares = [float(n) for n in plans[0].samples]
        fit(scenario, HeteroDDPStrategy(shares=shares), STEPS_A_BLOCK * len(plans), Sweep(plans), clock)
        for plan, rate in zip(plans, rates(clock, batch, len(plans)), strict=True):
            by_plan[plan].append(rate)
    alone = torch.tensor(samples_per_s_alone(scenario, tuned.samples[dist.get_rank()]), dtype=torch.float64)
    dist.all_reduce(alone)
    best = max(by_plan, key=lambda plan: median(by_plan[plan]))
    measured_s = batch / median(by_plan[tuned])
    return {
        "plan": tuned.samples,
        "best_plan": best.samples,
        "ddp": median(ddp),
        "cold": batch * COLD_STEPS / sum(cold[:COLD_STEPS]),
        "tuned": median(by_plan[tuned]),
        "best": median(by_plan[best]),
        "bound": alone.item(),
        "spread": (max(by_plan[tuned]) - min(by_plan[tuned])) / median(by_plan[tuned]),
        "changes": [step for step, _ in balancer.changes],
        "predicted_s": own_s + balancer.communication_s,
        "measured_s": measured_s,
        "cold_step_s": cold,
        "solution": solve_batch(
            [StepTime(f * scenario.overhead_s, f * scenario.seconds_per_sample) for f in scenario.factors],
            batch,
            min_samples=1,
        ).samples,
    }


def measure_throttled(scenario: Scenario) -> dict[str, Any]:
    """Return how many steps pass behind each change of speed until 95 % of the new optimum is reached."""
    clock, slow_down = StepClock(), slowed(scenario)
    balancer, steps = LoadBalancer(verbose=False), 2 * scenario.recovered_at - scenario.throttled_at
    fit(scenario, HeteroDDPStrategy(), steps, Throttle(scenario, slow_down), balancer, clock, slow_down=slow_down)
    seconds = [0.0, *clock.seconds()]
    found = {}
    for name, begin, end in (
        ("throttled", scenario.throttled_at, scenario.recovered_at),
        ("recovered", scenario.recovered_at, steps),
    ):
        factor = 2.0 if name == "throttled" else 1.0
        times = [StepTime(0, f * scenario.seconds_per_sample) for f in (factor, 1.0)]
        optimum_s = predicted_step_s(times, solve_batch(times, 2 * scenario.batch_size))
        # what this machine adds to a step is measured where the split is known to be right: at the end
        added_s = median(seconds[-20:]) - scenario.batch_size * scenario.seconds_per_sample
        # medians of five steps: a step that the machine disturbed says nothing about the split; the last median that
        # is late is that of three late steps and two that are not
        late = [i for i in range(begin, end - 4) if median(seconds[i : i + 5]) > (optimum_s + added_s) / 0.95]
        found[f"steps_{name}"] = max(late) + 3 - begin if late else 0
    return {**found, "changes": [(step, plan.samples) for step, plan in balancer.changes], "step_s": seconds}


def main() -> None:
    """Measure the scenario named on the command line."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    name, path = sys.argv[1:]
    scenario = SCENARIOS[name]
    result = measure_throttled(scenario) if scenario.throttled else measure(scenario)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
