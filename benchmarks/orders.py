"""Compare orders of passes through the Trainer, on devices of known speed, with each other and with the limit.

Torch's zero-bubble schedules, which know of no unequal devices, run in the same processes, in turn.
"""

from __future__ import annotations

from statistics import median
from typing import Any, get_args

import torch.distributed as dist
from pipeline import FEATURES, LAYERS, MICRO_BATCHES, STEPS, train
from scenarios import Scenario
from zero_bubble import ZERO_BUBBLE, zero_bubble_s

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.balance.pipeline.stages import StagePlan, WantedSchedule

SCHEDULES = get_args(WantedSchedule)
ROUNDS = 3


def measure_orders(scenario: Scenario) -> dict[str, Any]:
    """Return the measured fraction of the limit for each schedule, for ours the predicted one, and what was chosen."""
    limit_s = LAYERS * scenario.seconds_per_sample * scenario.batch_size / sum(1 / f for f in scenario.factors)
    seconds: dict[str, list[float]] = {name: [] for name in (*SCHEDULES, *ZERO_BUBBLE)}
    predicted: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    chosen: dict[str, list[str]] = {name: [] for name in SCHEDULES}
    for _ in range(ROUNDS):
        for name in SCHEDULES:
            strategy = HeteroPipelineStrategy(num_microbatches=MICRO_BATCHES, schedule=name, verbose=False)
            seconds[name].append(median(train(scenario, strategy, scenario.world_size, STEPS, list(scenario.factors))))
            findings = strategy.findings
            assert findings is not None
            predicted[name].append(findings.advice.step_s)
            way = name if findings.choice is None else findings.choice.name
            layers = ":".join(f"{layers_of(findings.plan, stage):g}" for stage in range(findings.plan.num_stages))
            chosen[name].append(f"{way} {layers}")
            dist.barrier()
        for name in ZERO_BUBBLE:
            seconds[name].append(zero_bubble_s(scenario, name, LAYERS, FEATURES, MICRO_BATCHES, STEPS))
    return {
        "limit_s": limit_s,
        "micro_batches": MICRO_BATCHES,
        "measured": {name: limit_s / median(values) for name, values in seconds.items()},
        "predicted": {name: limit_s / median(values) for name, values in predicted.items()},
        "chosen": {name: sorted(set(values)) for name, values in chosen.items()},
    }


def layers_of(plan: StagePlan, stage: int) -> float:
    """Return how many layers a stage runs for a micro-batch on average; it shares one for some of them."""
    return sum(len(plan.layers(stage, i)) for i in range(MICRO_BATCHES)) / MICRO_BATCHES
