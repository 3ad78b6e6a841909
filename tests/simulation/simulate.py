"""Simulate a training whose ranks drive the same tuning session as real ranks, in a closed loop.

The throughput of a thousand ranks cannot be measured on two cores, but the decisions for them can be checked. Step
times are drawn; everything that follows from them is computed by the code of real trainings.
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
    """The variation of a rank's steps.

    Attributes:
        deviation: Standard deviation of a step's time, relative to that time.
        spike_rate: Probability that a step takes ``spike`` times as long.
        spike: Factor by which the time of such a step is multiplied.
        rank_zero_every: Number of steps after which rank zero takes ``spike`` times as long, as if it logged; 0 for
            never.
    """

    deviation: float = 0.0
    spike_rate: float = 0.0
    spike: float = 5.0
    rank_zero_every: int = 0

    def factor(self, rng: random.Random, rank: int, step: int) -> float:
        """Draw the factor between a rank's actual and expected time for a step."""
        factor = max(_LEAST_FACTOR, rng.gauss(1, self.deviation))
        periodic = rank == 0 and self.rank_zero_every and step % self.rank_zero_every == 0
        spiked = periodic or (self.spike_rate and rng.random() < self.spike_rate)
        return factor * self.spike if spiked else factor


_STEADY = Jitter()


@dataclass(frozen=True)
class Run:
    """The outcome of a simulated training.

    Attributes:
        efficiency: Efficiency of each step: the time under the best plan over the time under the current plan, both
            without jitter.
        changes: Changes of plan, as pairs of the first step and the plan.
        decisions: All decisions.
    """

    efficiency: tuple[float, ...]
    changes: tuple[tuple[int, BatchPlan], ...]
    decisions: tuple[Decision, ...]

    def steps_until(self, efficiency: float, first_step: int = 0) -> int:
        """Return the number of steps after which the efficiency stays at least at ``efficiency`` for twenty steps.

        Args:
            efficiency: Efficiency to reach.
            first_step: Step from which the steps are counted.

        Raises:
            StopIteration: It never does.
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
        truth: Step time of each rank, shape ``(world_size,)``.
        global_batch_size: Number of samples that are divided.
        steps: Number of training steps.
        jitter: Variation of a rank's steps.
        seed: Seed of the variation.
        limits: The limits that every plan must respect.
        first_guess: Shares that the nominal speeds suggest, one number per rank; adopted after the first step.
        factors: Changes of speed, by step: the rank, and the factor by which its time is multiplied from then on.

    Returns:
        The outcome.
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
