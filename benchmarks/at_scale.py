"""Measure what a few cores cannot run: the solver for 10,000 ranks, and the tuning of 1,024 simulated ranks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median

from simulation.simulate import Jitter, simulate

from lightning_hetero.balance.batch.batch_solver import solve_batch
from lightning_hetero.balance.tuning.rebalancer import Rebalancer
from lightning_hetero.balance.types import BatchLimits, BatchPlan, PlanSchedule, StepTime, WindowTiming

__all__ = ["CASES", "RANKS", "SEEDS", "SHOWN_STEPS", "efficiencies", "milliseconds"]

RANKS = 1024
SAMPLES_A_RANK = 64
SHOWN_STEPS = (0, 10, 20, 60)
SEEDS = 100


@dataclass(frozen=True)
class Fleet:
    """A large number of devices.

    Attributes:
        kinds: How many times as long each kind of device takes; all kinds have the same number of ranks.
        spread: Relative standard deviation of the speed among devices of one kind.
        stragglers: Number of ranks that take twice as long as their kind.
    """

    kinds: tuple[float, ...]
    spread: float = 0.0
    stragglers: int = 1

    def step_times(self, seed: int, ranks: int = RANKS) -> list[StepTime]:
        """Draw the step time of each rank."""
        rng = random.Random(seed)
        factors = [self.kinds[rank * len(self.kinds) // ranks] * rng.gauss(1, self.spread) for rank in range(ranks)]
        for rank in rng.sample(range(ranks), self.stragglers):
            factors[rank] *= 2
        return [StepTime(0.010 * factor, 0.001 * factor) for factor in factors]


# Like steps of real devices: some jitter, and one step in two hundred that something disturbed.
_SOME, _MUCH = Jitter(0.03, spike_rate=0.005), Jitter(0.10, spike_rate=0.005)
CASES = {
    "one kind, 10 % jitter": (Fleet((1,)), _MUCH),
    "two kinds, 1:2, 10 % jitter": (Fleet((1, 2)), _MUCH),
    "four kinds, 1:2:3:4, speeds spread by 3 %": (Fleet((1, 2, 3, 4), 0.03), _SOME),
}


def efficiency(name: str, seed: int) -> tuple[float, ...]:
    """Return the efficiency of one training run of case ``name`` at ``SHOWN_STEPS``."""
    fleet, jitter = CASES[name]
    run = simulate(fleet.step_times(seed), SAMPLES_A_RANK * RANKS, SHOWN_STEPS[-1] + 1, jitter=jitter, seed=seed)
    return tuple(run.efficiency[step] for step in SHOWN_STEPS)


def efficiencies(name: str, seeds: int = SEEDS) -> list[tuple[float, float]]:
    """Return for each of ``SHOWN_STEPS`` the median and the efficiency that 99 of 100 training runs reach."""
    with ProcessPoolExecutor() as pool:
        runs = list(pool.map(partial(efficiency, name), range(seeds)))
    ascending = [sorted(values) for values in zip(*runs, strict=True)]
    return [(median(values), values[round(0.01 * (seeds - 1))]) for values in ascending]


def milliseconds(ranks: int = 10_000) -> dict[str, float]:
    """Return the milliseconds that decisions for many ranks take, each as the median of several runs."""
    times = [StepTime(0.01 + 1e-6 * (r % 97), 0.001 * (1 + r % 4)) for r in range(ranks)]
    batch = SAMPLES_A_RANK * ranks
    plan = solve_batch(times, batch, min_samples=1)
    equal = BatchPlan((SAMPLES_A_RANK,) * ranks)
    schedule = PlanSchedule.constant(equal)
    for step in range(1, 100):
        schedule = schedule.with_change(10 * step, plan if step % 2 else equal)
    judge = Rebalancer(equal, equal, BatchLimits(), 0.05, 20)
    windows = [WindowTiming(n, 5, time.seconds(n), 0.001) for time, n in zip(times, equal.samples, strict=True)]
    return {
        "solver": _milliseconds(lambda: solve_batch(times, batch, min_samples=1)),
        "look-up in a plan schedule of a hundred plans": _milliseconds(lambda: schedule.at(500)),
        "complete evaluation of a window": _milliseconds(lambda: judge.update(windows)),
    }


def _milliseconds(work: Callable[[], object]) -> float:
    found = []
    for _ in range(20):
        start_s = time.perf_counter()
        work()
        found.append((time.perf_counter() - start_s) * 1e3)
    return median(found)


if __name__ == "__main__":
    print(milliseconds())
    for case in CASES:
        print(case, efficiencies(case, 4), flush=True)
