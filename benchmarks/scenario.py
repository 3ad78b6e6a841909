"""Measure one scenario; every rank runs this under torchrun, and rank zero writes the results.

    torchrun --nproc-per-node 2 benchmarks/scenario.py "1:2" result.json

Everything that is compared runs in the same processes, in turn, so a machine that becomes slower slows down all of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import contention
import orders
import pipeline
import real_pipeline
import replicas
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from scenarios import SCENARIOS, Scenario
from timing import QUIET, SKIPPED_STEPS, STEPS_A_BLOCK, StepClock, without_launcher
from torch.utils.data import DataLoader
from workloads import WORKLOADS

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.balance.batch.batch_solver import predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.types import BatchPlan, StepTime
from lightning_hetero.testing import SlowDown

COLD_STEPS = 100
DDP_BLOCKS = 2
VIRTUAL_ROUNDS, LINK_ROUNDS, REAL_ROUNDS = 2, 2, 5
SCANNED_SPLITS, STEPS_A_SCANNED_SPLIT = 12, 4
PAIRS, STEPS_A_PAIR = 16, 40
QUOTA_STEP_S = 0.12


class Sweep(Callback):
    """Trains with one fixed split after the other, each for a block of steps."""

    def __init__(self, plans: Sequence[BatchPlan], steps_a_block: int) -> None:
        self.plans, self.steps_a_block = plans, steps_a_block

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Change to the next split at the end of a block."""
        block, step = divmod(trainer.global_step, self.steps_a_block)
        strategy = trainer.strategy
        if step == 0 and block < len(self.plans) and isinstance(strategy, HeteroDDPStrategy):
            strategy.change_plan(trainer.global_step, self.plans[block])


class Throttle(Callback):
    """Makes rank 0 twice as slow, and later as fast as before."""

    def __init__(self, scenario: Scenario, slow_down: SlowDown) -> None:
        self.changes = {scenario.throttled_at: 2.0, scenario.recovered_at: 0.5}
        self.slow_down = slow_down

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Change the speed of rank 0 at two steps."""
        self.slow_down.factors[0] *= self.changes.get(trainer.global_step, 1.0)


# ---- trainings -------------------------------------------------------------------------------------------------------


def fit(scenario: Scenario, strategy: Any, steps: int, *callbacks: Callback) -> None:
    """Train on all ranks together for some steps."""
    nodes = int(os.environ["GROUP_WORLD_SIZE"])
    spread = {"devices": scenario.world_size // nodes, "num_nodes": nodes, "strategy": strategy}
    train(scenario, spread, steps, scenario.batch_size, scenario.world_size, [*slowed(scenario, callbacks), *callbacks])


def train(
    scenario: Scenario, spread: dict[str, Any], steps: int, batch_size: int, ranks: int, callbacks: list[Callback]
) -> None:
    """Train for some steps."""
    seed_everything(0, verbose=False)
    trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=callbacks, **spread, **QUIET)
    workload = WORKLOADS[scenario.workload]()
    trainer.fit(workload, DataLoader(workload.samples(ranks * batch_size * (steps + 1)), batch_size=batch_size))


def slowed(scenario: Scenario, callbacks: Sequence[Callback] = ()) -> list[Callback]:
    """Return the callback that simulates the scenario's devices, unless there is one or the devices do real work."""
    if not scenario.is_virtual or any(isinstance(callback, SlowDown) for callback in callbacks):
        return []
    return [SlowDown(list(scenario.factors), scenario.seconds_per_sample, scenario.overhead_s)]


def rates_alone(scenario: Scenario, plan: BatchPlan, steps: int = 14) -> list[float]:
    """Return the samples/s of each rank alone, with its mini-batch in ``plan``; all ranks run at the same time."""
    rank = dist.get_rank()
    samples, clock = plan.samples[rank], StepClock()
    dist.barrier()
    with without_launcher():
        devices = (
            [SlowDown([scenario.factors[rank]], scenario.seconds_per_sample, scenario.overhead_s)]
            if scenario.is_virtual
            else []
        )
        train(scenario, {"devices": 1}, steps, samples, 1, [*devices, clock])
    rates = torch.zeros(scenario.world_size, dtype=torch.float64)
    rates[rank] = samples / median(clock.seconds()[SKIPPED_STEPS:])
    dist.all_reduce(rates)
    return rates.tolist()


def rates_of(scenario: Scenario, plans: Sequence[BatchPlan], steps_a_block: int = STEPS_A_BLOCK) -> list[float]:
    """Return the samples/s of each plan, measured one after the other in one training run."""
    clock, shares = StepClock(), [float(n) for n in plans[0].samples]
    sweep = Sweep(plans, steps_a_block)
    fit(scenario, HeteroDDPStrategy(shares=shares), steps_a_block * len(plans), sweep, clock)
    return clock.rates(plans[0].global_batch_size, len(plans), steps_a_block)


# ---- splits ----------------------------------------------------------------------------------------------------------


def neighbours(plan: BatchPlan, factors: Sequence[float]) -> list[BatchPlan]:
    """Return splits around ``plan`` that move samples between the fast and the slow half, or between two kinds."""
    order = sorted(range(len(factors)), key=lambda rank: -plan.samples[rank])
    half = len(order) // 2
    moves = [(order[:half], list(reversed(order[-half:])), part) for part in (-0.25, -0.12, -0.06, 0.06, 0.12, 0.25)]
    kinds = [[rank for rank in order if factors[rank] == kind] for kind in sorted(set(factors))]
    if 2 < len(factors) < 8:
        moves += [(a, b, 0.06) for a, b in permutations(kinds, 2)]
    found = {plan.samples: plan}
    for givers, takers, part in moves:
        samples = list(plan.samples)
        for a, b in zip(givers, takers, strict=False):
            moved = min(max(round(part * samples[b]), 1 - samples[a]), samples[b] - 1) or (1 if part > 0 else -1)
            samples[a] += moved
            samples[b] -= moved
        if min(samples) > 0:
            found.setdefault(tuple(samples), BatchPlan(tuple(samples)))
    return list(found.values())


def scanned(scenario: Scenario, batch: int) -> list[BatchPlan]:
    """Return the fastest three of all splits of two ranks into twelfths, each run for a few steps."""
    plans = [
        BatchPlan((batch * part // SCANNED_SPLITS, batch - batch * part // SCANNED_SPLITS))
        for part in range(1, SCANNED_SPLITS)
    ]
    rates = rates_of(scenario, plans, STEPS_A_SCANNED_SPLIT)
    # The ranks measure nearly the same times, but all of them must use the splits that rank zero chose.
    found = [sorted(range(len(plans)), key=lambda i: -rates[i])[:3]]
    dist.broadcast_object_list(found)
    return [plans[i] for i in found[0]]


def against_best(by_plan: dict[BatchPlan, list[float]], tuned: BatchPlan) -> list[float]:
    """Return for each round the rate of the tuned split over that of the split that was fastest in the other rounds.

    If the best of many noisy splits were chosen by the round that it is compared in, it would be the luckiest one.
    """
    ratios = []
    for r, rate in enumerate(by_plan[tuned]):
        others = {plan: median(v for i, v in enumerate(rates) if i != r) for plan, rates in by_plan.items()}
        ratios.append(rate / by_plan[max(others, key=lambda plan: others[plan])][r])
    return ratios


# ---- what is measured ------------------------------------------------------------------------------------------------


def measure_shares(scenario: Scenario) -> dict[str, Any]:
    """Return everything that is compared, in samples/s unless the name says otherwise."""
    equal = BatchPlan((scenario.batch_size,) * scenario.world_size)
    calibrated = rates_alone(scenario, equal) if not scenario.is_virtual else []
    if calibrated:
        # A quota that refills while a rank waits makes short steps faster than its speed; see the text of the page.
        wanted = int(QUOTA_STEP_S * sum(calibrated) / scenario.world_size)
        scenario = replace(scenario, batch_size=max(scenario.batch_size, wanted))
        equal = BatchPlan((scenario.batch_size,) * scenario.world_size)
    batch = scenario.world_size * scenario.batch_size
    balancer, clock = LoadBalancer(verbose=False), StepClock()
    fit(scenario, HeteroDDPStrategy(), COLD_STEPS + 1, balancer, clock)
    cold = clock.seconds()
    tuned = balancer.changes[-1][1] if balancer.changes else equal
    own_s = predicted_step_s(balancer.step_times, tuned)
    plans = neighbours(tuned, scenario.factors)
    if scenario.world_size == 2:
        plans += scanned(scenario, batch)
    if calibrated:
        plans += [proportional_plan(calibrated, batch)]
    plans = [*dict.fromkeys(plan for plan in plans if plan != tuned), tuned]
    by_plan: dict[BatchPlan, list[float]] = {plan: [] for plan in plans}
    ddp: list[float] = []
    alone: list[float] = []
    rounds = LINK_ROUNDS if scenario.megabits_per_s else VIRTUAL_ROUNDS if scenario.is_virtual else REAL_ROUNDS
    for _ in range(rounds):
        clock = StepClock()
        fit(scenario, "ddp", STEPS_A_BLOCK * DDP_BLOCKS, clock)
        ddp += clock.rates(batch, DDP_BLOCKS)
        for plan, rate in zip(plans, rates_of(scenario, plans), strict=True):
            by_plan[plan].append(rate)
        alone.append(sum(rates_alone(scenario, tuned)))
    best = max(by_plan, key=lambda plan: median(by_plan[plan]))
    ratios = against_best(by_plan, tuned)
    return {
        "plan": tuned.samples,
        "best_plan": best.samples,
        "splits": len(plans) + (SCANNED_SPLITS - 1) * (scenario.world_size == 2),
        "calibrated": calibrated,
        "ddp": median(ddp),
        "cold": batch * COLD_STEPS / sum(cold[:COLD_STEPS]),
        "tuned": median(by_plan[tuned]),
        "best": median(by_plan[best]),
        "bound": median(alone),
        "against_best": [min(ratios), median(ratios), max(ratios)],
        "spread": (max(by_plan[tuned]) - min(by_plan[tuned])) / median(by_plan[tuned]),
        "changes": [step for step, _ in balancer.changes],
        "predicted_s": own_s + balancer.communication_s,
        "measured_s": batch / median(by_plan[tuned]),
        "solution": solve_batch(
            [StepTime(f * scenario.overhead_s, f * scenario.seconds_per_sample) for f in scenario.factors],
            batch,
            min_samples=1,
        ).samples
        if scenario.is_virtual
        else best.samples,
    }


def measure_drift(scenario: Scenario) -> dict[str, Any]:
    """Return how many steps it takes after each change of speed until 95 % of the new optimum is reached."""
    clock = StepClock()
    slow_down = SlowDown(list(scenario.factors), scenario.seconds_per_sample, scenario.overhead_s)
    balancer, steps = LoadBalancer(verbose=False), 2 * scenario.recovered_at - scenario.throttled_at
    fit(scenario, HeteroDDPStrategy(), steps, slow_down, Throttle(scenario, slow_down), balancer, clock)
    seconds = [0.0, *clock.seconds()]
    found = {}
    for name, begin, end in (
        ("throttled", scenario.throttled_at, scenario.recovered_at),
        ("recovered", scenario.recovered_at, steps),
    ):
        factor = 2.0 if name == "throttled" else 1.0
        times = [StepTime(0, f * scenario.seconds_per_sample) for f in (factor, 1.0)]
        optimum_s = predicted_step_s(times, solve_batch(times, 2 * scenario.batch_size))
        # The time that this machine adds to a step is measured at the end, where the split is known to be right.
        added_s = median(seconds[-20:]) - scenario.batch_size * scenario.seconds_per_sample
        # Medians of five steps, because a step that the machine disturbed says nothing about the split. The last median
        # that is late belongs to three late steps and two that are not.
        late = [i for i in range(begin, end - 4) if median(seconds[i : i + 5]) > (optimum_s + added_s) / 0.95]
        found[f"steps_{name}"] = max(late) + 3 - begin if late else 0
    return {**found, "changes": [(step, plan.samples) for step, plan in balancer.changes], "step_s": seconds}


def measure_cost(scenario: Scenario) -> dict[str, Any]:
    """Return the step time of hetero_ddp over that of ddp on equal devices, measured in pairs of training runs."""
    ratios, milliseconds, changes = [], [], 0
    for pair in range(PAIRS):
        found = {}
        for name in ("ddp", "hetero_ddp") if pair % 2 else ("hetero_ddp", "ddp"):
            clock, balancer = StepClock(), LoadBalancer(verbose=False)
            own = name == "hetero_ddp"
            fit(scenario, HeteroDDPStrategy() if own else "ddp", STEPS_A_PAIR, *([balancer] if own else []), clock)
            found[name] = median(clock.seconds()[SKIPPED_STEPS:])
            changes += len(balancer.changes)
        ratios.append(found["hetero_ddp"] / found["ddp"])
        milliseconds.append(found["ddp"] * 1e3)
    error = stdev(ratios) / math.sqrt(len(ratios))
    return {
        "ratio": fmean(ratios),
        "error": error,
        "ddp_ms": median(milliseconds),
        "changes": changes,
        "pairs": PAIRS,
        "steps": STEPS_A_PAIR,
    }


MEASURES = {
    "shares": measure_shares,
    "drift": measure_drift,
    "cost": measure_cost,
    "pipeline": pipeline.measure_splits,
    "orders": orders.measure_orders,
    "replicas": replicas.measure_replicas,
    "real": real_pipeline.measure_real_pipeline,
    "trainer": pipeline.measure_trainer,
}


def main() -> None:
    """Measure the scenario named on the command line."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, (name, path) = dist.get_rank(), sys.argv[1:]
    scenario = SCENARIOS[name]
    with contention.quota(scenario.quotas[rank], rank) if scenario.quotas else nullcontext():
        result = MEASURES[scenario.measures](scenario)
    if rank == 0:
        Path(path).write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
