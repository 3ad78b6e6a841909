"""Simulate a training whose stages are watched."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from lightning_hetero.balance.pipeline.stage_watch import StageReport, StageWatch
from lightning_hetero.balance.types import StepTiming

__all__ = ["Run", "on_time", "simulate", "unbiased"]

Factors = Callable[[int], Sequence[float]]
Bias = Callable[[Any, int], float]


@dataclass
class Run:
    """A simulated training."""

    plans: list[Any] = field(default_factory=list)  # of each step
    reasons: list[tuple[int, str]] = field(default_factory=list)
    measured: int = 0
    exchanges: int = 0


def unbiased(_: Any, __: int) -> float:
    return 1.0


def on_time(_: Any) -> float:
    return 1.0


def simulate(
    problem: Any,
    plan: Any,
    factors: Factors,
    steps: int = 200,
    jitter: float = 0.02,
    *,
    seed: int = 0,
    bias: Bias = unbiased,
    delay: Callable[[Any], float] = on_time,
    asynchronous: bool = False,
    slack: float = 0.0,
    remaining: float = inf,
    exchange_s: float = 0.0005,
    samples: Callable[[int], int] | None = None,
) -> Run:
    """Train with ranks that take ``factors(step)`` times as long as they did before the first step.

    Args:
        problem: What was known.
        plan: The first stages.
        factors: Factors of the ranks in a step.
        steps: Number of steps.
        jitter: Relative standard deviation of a rank's own time from step to step.
        seed: Seed of the jitter.
        bias: Factor of a rank under a plan besides.
        delay: How many times as long as predicted the steps of a plan take.
        asynchronous: Whether devices work asynchronously to their hosts.
        slack: Part of its time that a rank that waits does not show while hosts do not wait for devices.
        remaining: Number of steps that are left at the beginning.
        exchange_s: Seconds of an exchange.
        samples: Number of samples in a step; by default always the usual number.
    """
    generator = random.Random(seed)
    watch: StageWatch[Any] = StageWatch(problem, plan, 0.05, 10, asynchronous=asynchronous)
    ranks = range(plan.world_size)
    timings: list[list[StepTiming]] = [[] for _ in ranks]
    run = Run()
    for step in range(steps):
        if watch.is_due:
            run.exchanges += 1
            reports = [StageReport(watch.summary(timings[rank]), exchange_s, remaining - step) for rank in ranks]
            reports = [StageReport.from_numbers(report.to_numbers()) for report in reports]
            decision = watch.decide(reports)
            reason = watch.follow(decision)
            if reason is not None:
                run.reasons.append((step, reason))
            timings = [[] for _ in ranks]
        run.plans.append(watch.plan)
        if watch.measures:
            run.measured += 1
            size = problem.samples if samples is None else samples(step)
            own = [s * f for s, f in zip(problem.own_s(watch.plan, size), factors(step), strict=True)]
            step_s = delay(watch.plan) * problem.step_s(watch.plan, factors(step)) * size / problem.samples
            step_s *= max(generator.gauss(1, jitter), 0.1)
            for rank in ranks:
                waits = 1 - own[rank] / max(own)
                hidden = 1 - slack * (waits > 0.02) if asynchronous and not watch.synchronised else 1.0
                noise = max(generator.gauss(1.0, jitter), 0.1)
                own_s = own[rank] * bias(watch.plan, rank) * noise * hidden
                waiting_s = 0.0 if watch.synchronised else max(step_s - own_s, 0.0)
                timings[rank].append(StepTiming(size, own_s, waiting_s))
        watch.step_ended()
    return run
