"""Compare how fast published rules find the shares of unequal devices: per epoch, and this package's, per window.

The devices are simulated, so that all rules meet the same steps: ``overhead + samples * seconds per sample`` with
jitter. What is counted is what a user gets: the samples that are trained until the time in which the best plan trains
100 or 1,000 steps, and 100 steps after a device has slowed down.  Each rule is written from its paper's description:

* proportional control of iteration times, per epoch, with a dead band of 20 %: Tyagi & Sharma, "Taming Resource
  Heterogeneity In Distributed ML Training With Dynamic Batching", ACSOS 2020, and OmniLearn, TPDS 2025;
* a share in proportion to share / time, per epoch: Ye et al., "DBS: Dynamic Batch Size For Distributed Deep Neural
  Network Training", 2020;
* a linear model of the step time, fitted to all epochs so far and solved for equal times: Nie et al., "Cannikin",
  Middleware 2024. It gets this package's solver, and its second epoch's shares from the rule above, for a second point.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from simulation.simulate import Jitter, simulate

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.types import BatchPlan, StepTime

__all__ = ["CASES", "EPOCHS", "RULES", "Case", "Trained", "ours", "trained"]

STEPS, CHANGES_AT, AFTER = 1_000, 1_000, 100
EPOCHS = (25, 100, 400)  # steps
JITTER = Jitter(0.03, spike_rate=0.005)

# The plans and mean times per step of the epochs so far give the plan of the next.
Rule = Callable[[Sequence[BatchPlan], Sequence[Sequence[float]]], BatchPlan]


@dataclass(frozen=True)
class Case:
    """Devices.

    Attributes:
        step_times: Step time of each rank.
        global_batch_size: Number of samples per step.
        slower: Rank that takes twice as long from step ``CHANGES_AT`` on.
    """

    step_times: tuple[StepTime, ...]
    global_batch_size: int
    slower: int


def _devices(*factors: float, overhead_s: float = 0.005) -> Case:
    times = tuple(StepTime(overhead_s * min(factor, 2), 0.001 * factor) for factor in factors)
    return Case(times, 32 * len(factors), len(factors) - 1)


CASES = {
    "equal": _devices(1, 1),
    "1:2": _devices(1, 2),
    "1:4": _devices(1, 4),
    "1:2, much overhead": _devices(1, 2, overhead_s=0.03),
    "1:2:4": _devices(1, 2, 4),
    "eight, 1:1:1:1:2:2:4:4": _devices(1, 1, 1, 1, 2, 2, 4, 4),
}


def proportional_control(plans: Sequence[BatchPlan], times_s: Sequence[Sequence[float]]) -> BatchPlan:
    """Change each mini-batch by the throughput times the error, where a rank is off by more than the dead band."""
    plan, own_s = plans[-1], times_s[-1]
    mean_s = fmean(own_s)
    if all(abs(seconds - mean_s) <= 0.2 * mean_s for seconds in own_s):
        return plan
    wanted = [max(n - n / s * (s - mean_s), 0.0) for n, s in zip(plan.samples, own_s, strict=True)]
    return proportional_plan(wanted, sum(plan.samples), min_samples=1)


def share_over_time(plans: Sequence[BatchPlan], times_s: Sequence[Sequence[float]]) -> BatchPlan:
    """Divide the batch in proportion to each rank's throughput in the last epoch."""
    speeds = [n / s for n, s in zip(plans[-1].samples, times_s[-1], strict=True)]
    return proportional_plan(speeds, sum(plans[-1].samples), min_samples=1)


def fitted_model(plans: Sequence[BatchPlan], times_s: Sequence[Sequence[float]]) -> BatchPlan:
    """Fit a line per rank to the epochs so far and solve for equal times."""
    if len(plans) < 2:
        return share_over_time(plans, times_s)
    models = []
    for rank in range(plans[-1].world_size):
        sizes, seconds = [plan.samples[rank] for plan in plans], [own_s[rank] for own_s in times_s]
        mean_size, mean_s = fmean(sizes), fmean(seconds)
        spread = sum((n - mean_size) ** 2 for n in sizes)
        slope = sum((n - mean_size) * (s - mean_s) for n, s in zip(sizes, seconds, strict=True)) / (spread or 1.0)
        if slope <= 0:  # it has had one size only, or noise that outweighs the sizes' differences
            slope = seconds[-1] / sizes[-1]
        models.append(StepTime(max(mean_s - slope * mean_size, 0.0), slope))
    return solve_batch(models, sum(plans[-1].samples), min_samples=1)


RULES: dict[str, Rule] = {
    "equal": lambda plans, _: plans[-1],
    "proportional control": proportional_control,
    "share / time": share_over_time,
    "fitted model": fitted_model,
}


@dataclass(frozen=True)
class Trained:
    """Samples that are trained, relative to those of the best plan, in the same time.

    Attributes:
        first_100: In the time of its first 100 steps.
        first_1000: In the time of its first 1,000 steps.
        after_change: In the time of its 100 steps after a device has slowed down.
    """

    first_100: float
    first_1000: float
    after_change: float


def ours(case: Case, seed: int) -> Trained:
    """Return what this package's tuning trains."""
    changes = {CHANGES_AT: (case.slower, 2.0)}
    run = simulate(
        case.step_times, case.global_batch_size, CHANGES_AT + 2 * AFTER, jitter=JITTER, seed=seed, factors=changes
    )
    return _trained(run.efficiency)


def trained(rule: Rule, case: Case, epoch: int, seed: int) -> Trained:
    """Return what a rule trains that changes the plan after each epoch of ``epoch`` steps."""
    rng, truth = random.Random(seed), list(case.step_times)
    best_s = _step_s(truth, case)
    plan = proportional_plan([1.0] * len(truth), case.global_batch_size, min_samples=1)
    plans: list[BatchPlan] = []
    times_s: list[list[float]] = []
    measured: list[list[float]] = []
    efficiency = []
    for step in range(CHANGES_AT + 2 * AFTER):
        if step == CHANGES_AT:
            time = truth[case.slower]
            truth[case.slower] = StepTime(2 * time.overhead_s, 2 * time.seconds_per_sample)
            best_s = _step_s(truth, case)
        if step and step % epoch == 0:
            plans.append(plan)
            times_s.append([fmean(own_s) for own_s in zip(*measured, strict=True)])
            plan, measured = rule(plans, times_s), []
        efficiency.append(best_s / predicted_step_s(truth, plan))
        measured.append([
            time.seconds(n) * JITTER.factor(rng, rank, step)
            for rank, (time, n) in enumerate(zip(truth, plan.samples, strict=True))
        ])  # fmt: skip
    return _trained(efficiency)


def _step_s(truth: Sequence[StepTime], case: Case) -> float:
    return predicted_step_s(truth, solve_batch(truth, case.global_batch_size, min_samples=1))


def _trained(efficiency: Sequence[float]) -> Trained:
    return Trained(
        _steps_within(efficiency, 100) / 100,
        _steps_within(efficiency, STEPS) / STEPS,
        _steps_within(efficiency[CHANGES_AT:], AFTER) / AFTER,
    )


def _steps_within(efficiency: Sequence[float], time: float) -> float:
    """Return how many steps, the last one in part, end within ``time``, in units of the best plan's step."""
    steps = 0.0
    for one in efficiency:
        took = 1 / one
        if took >= time:
            return steps + time / took
        steps, time = steps + 1, time - took
    return steps


def main(seeds: int = 20) -> None:
    """Print a table per length of an epoch: the medians of all seeds."""
    for epoch in EPOCHS:
        print(f"\nEpochs of {epoch} steps: the first 100 steps, the first 1,000, and 100 after a change\n")
        print("| devices |", " | ".join((*RULES, "`hetero_ddp`")), "|")
        print("|---|" + "---|" * (len(RULES) + 1))
        for name, case in CASES.items():
            runs = [[trained(rule, case, epoch, seed) for seed in range(seeds)] for rule in RULES.values()]
            runs.append([ours(case, seed) for seed in range(seeds)])
            print(f"| {name} |", " | ".join(map(_cell, runs)), "|")


def _cell(runs: Sequence[Trained]) -> str:
    columns = zip(*((run.first_100, run.first_1000, run.after_change) for run in runs), strict=True)
    return ", ".join(f"{median(column):.2f}" for column in columns)


if __name__ == "__main__":
    main()
