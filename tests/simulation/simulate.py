"""A training on simulated ranks, in closed loop with the session that real ranks follow.

What the balancer reaches on a thousand ranks cannot be measured on two cores; what it decides there can. Step times are
drawn; everything that follows from them is the code that trainings run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulation.ranks import SimulatedRanks

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.tuning.rebalancer import Decision
from lightning_hetero.balance.tuning.session import StepFacts
from lightning_hetero.balance.types import BatchLimits, BatchPlan, PlanSchedule, StepTime, StepTiming

__all__ = ["Jitter", "Run", "simulate"]

_NO_LIMITS = BatchLimits()
_LEAST_FACTOR = 0.2


@dataclass(frozen=True)
class Jitter:
    """What makes a rank's steps differ.

    Attributes:
        deviation: standard deviation of a step's time, as a part of it.
        spike_rate: probability that a step takes ``spike`` times as long.
        spike: how many times as long such a step takes.
        rank_zero_every: every so many steps rank zero takes ``spike`` times as long, as if it logged; 0 for never.
    """

    deviation: float = 0.0
    spike_rate: float = 0.0
    spike: float = 5.0
    rank_zero_every: int = 0

    def factor(self, rng: random.Random, rank: int, step: int) -> float:
        """Draw how many times as long as expected a rank takes for a step."""
        factor = max(_LEAST_FACTOR, rng.gauss(1, self.deviation))
        periodic = rank == 0 and self.rank_zero_every and step % self.rank_zero_every == 0
        spiked = periodic or (self.spike_rate and rng.random() < self.spike_rate)
        return factor * self.spike if spiked else factor


_STEADY = Jitter()


@dataclass(frozen=True)
class Run:
    """What happened in a simulated training.

    Attributes:
        efficiency: Of each step, how long the best plan would take over how long the current plan takes, both without
            jitter.
        changes: The changes of plan, as pairs of the first step and the plan.
        decisions: Every decision.
    """

    efficiency: tuple[float, ...]
    changes: tuple[tuple[int, BatchPlan], ...]
    decisions: tuple[Decision, ...]

    def steps_until(self, efficiency: float, first_step: int = 0) -> int:
        """Return the number of steps from ``first_step`` after which it stays above ``efficiency`` for twenty steps.

        Raises:
            StopIteration: it never does.
        """
        later = self.efficiency[first_step:]
        return next(i for i in range(len(later)) if min(later[i : i + 20]) >= efficiency)


def simulate(
    truth: Sequence[StepTime],
    global_batch_size: int,
    steps: int,
    *,
    jitter: Jitter = _STEADY,
    seed: int = 0,
    limits: BatchLimits = _NO_LIMITS,
    first_guess: Sequence[float] | None = None,
    factors: Mapping[int, tuple[int, float]] | None = None,
) -> Run:
    """Train on ranks of known speed.

    Args:
        truth: the step time of each rank, shape ``(world_size,)``.
        global_batch_size: samples that are divided.
        steps: training steps.
        jitter: what makes a rank's steps differ.
        seed: of what is drawn.
        limits: what every plan has to respect.
        first_guess: Shares that the devices' data promise, one number per rank; adopted after the first step.
        factors: at which step which rank's time is multiplied by what, from there on.

    Returns:
        What happened.
    """
    rng, truth = random.Random(seed), list(truth)
    equal = proportional_plan([1.0] * len(truth), global_batch_size, limits, min_samples=1)
    suggestion = first_guess and proportional_plan(first_guess, global_batch_size, limits, min_samples=1)
    ranks = SimulatedRanks(PlanSchedule.constant(equal), limits)
    ranks.begin(0, suggestion or None)
    efficiency: list[float] = []
    optimum_s = _least_step_s(truth, global_batch_size, limits)
    for step in range(steps):
        if factors and step in factors:
            rank, factor = factors[step]
            truth[rank] = StepTime(truth[rank].overhead_s * factor, truth[rank].seconds_per_sample * factor)
            optimum_s = _least_step_s(truth, global_batch_size, limits)
        plan = ranks.schedule.at(step)
        efficiency.append(optimum_s / predicted_step_s(truth, plan))
        own_s = [
            time.seconds(n) * jitter.factor(rng, rank, step)
            for rank, (time, n) in enumerate(zip(truth, plan.samples, strict=True))
        ]
        slowest_s = max(own_s)
        timings = [StepTiming(n, seconds, slowest_s - seconds) for n, seconds in zip(plan.samples, own_s, strict=True)]
        ranks.end_step(StepFacts(step, ranks.schedule, global_batch_size, step, math.inf), timings)
    return Run(tuple(efficiency), tuple(ranks.session.changes), tuple(result.decision for result in ranks.results))


def _least_step_s(truth: Sequence[StepTime], global_batch_size: int, limits: BatchLimits) -> float:
    return predicted_step_s(truth, solve_batch(truth, global_batch_size, limits, min_samples=1))
