"""What a plan is worth, and what would be worth more: read off the step times, for people.

The throughput that a rank could reach alone, at the mini-batch that it has, is n / t(n).  Their sum is what no division
of the batch can exceed; what the ranks reach together, as a part of that, is the efficiency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTime
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["Advice", "advise", "enough_global_batch_size", "predicted_efficiency", "rounding_loss"]


@dataclass(frozen=True)
class Advice:
    """What is predicted of a plan and of its alternatives.

    Attributes:
        step_s: seconds of a step under the plan, communication included.
        speed_up: samples a second under the plan over those under equal shares.
        efficiency: samples a second under the plan over the sum of what each rank would process alone.
        ranks_to_drop: ranks without which a step would be faster by more than ``min_gain``, in ascending order.
        speed_up_without: samples a second without these ranks over those under the plan; 1 where there are none.
        rounding: the part of a step that is lost because samples come in whole multiples.
        enough_global_batch_size: a global batch at which no more than ``min_gain`` is lost to rounding; None where
            that holds already.
    """

    step_s: float
    speed_up: float
    efficiency: float
    ranks_to_drop: tuple[int, ...]
    speed_up_without: float
    rounding: float
    enough_global_batch_size: int | None

    def sentences(self) -> list[str]:
        """Return what a person should know or might change; empty where there is nothing to say."""
        found = []
        if self.ranks_to_drop:
            ranks = ", ".join(map(str, self.ranks_to_drop))
            found.append(
                f"without rank {ranks} a step would be {self.speed_up_without - 1:.0%} faster: even one sample takes"
                f" it longer than the others need for all"
            )
        if self.enough_global_batch_size is not None:
            found.append(
                f"the global batch is too small for the ratio of speeds: rounding to whole samples costs"
                f" {self.rounding:.0%} of a step; from about {self.enough_global_batch_size} samples on it would not"
            )
        return found


def advise(
    step_times: Sequence[StepTime],
    plan: BatchPlan,
    limits: BatchLimits,
    communication_s: float = 0.0,
    min_gain: float = 0.05,
) -> Advice:
    """Predict what ``plan`` is worth and whether other devices or another global batch would be worth more.

    Args:
        step_times: expected step time of each rank, shape ``(world_size,)``.
        plan: the plan to judge.
        limits: what every plan has to respect.
        communication_s: what a step takes besides the slowest rank's own time.
        min_gain: what is worth mentioning, as a part of the samples a second.

    Example:
        >>> times = [StepTime(0.0, 0.001), StepTime(0.0, 0.002), StepTime(0.5, 0.001)]
        >>> advise(times, BatchPlan((63, 32, 1)), BatchLimits()).ranks_to_drop
        (2,)
    """
    batch = plan.global_batch_size
    step_s = predicted_step_s(step_times, plan) + communication_s
    equal = proportional_plan([1.0] * plan.world_size, batch, limits, min_samples=1)
    dropped, without_s = _to_drop(step_times, batch, limits, step_s, communication_s)
    worth_it = step_s / without_s - 1.0 > min_gain
    rounding = rounding_loss(step_times, plan, limits, communication_s)
    return Advice(
        step_s=step_s,
        speed_up=(predicted_step_s(step_times, equal) + communication_s) / step_s,
        efficiency=predicted_efficiency(step_times, plan, communication_s),
        ranks_to_drop=dropped if worth_it else (),
        speed_up_without=step_s / without_s if worth_it else 1.0,
        rounding=rounding,
        enough_global_batch_size=(
            enough_global_batch_size(step_times, plan, limits, communication_s, min_gain)
            if rounding > min_gain
            else None
        ),
    )


def predicted_efficiency(step_times: Sequence[StepTime], plan: BatchPlan, communication_s: float = 0.0) -> float:
    """Return the samples a second under a plan over the sum of what each rank would process alone.

    Args:
        step_times: expected step time of each rank, shape ``(world_size,)``.
        plan: the plan to judge.
        communication_s: what a step takes besides the slowest rank's own time.
    """
    step_s = predicted_step_s(step_times, plan) + communication_s
    alone = sum(n / time.seconds(n) for time, n in zip(step_times, plan.samples, strict=True) if n)
    return plan.global_batch_size / step_s / alone


def _to_drop(
    step_times: Sequence[StepTime], batch: int, limits: BatchLimits, step_s: float, communication_s: float
) -> tuple[tuple[int, ...], float]:
    """Leave out ranks, those first that are last with one sample, for as long as the rest is faster for it."""
    least = limits.batch_multiple
    order = sorted(range(len(step_times)), key=lambda rank: step_times[rank].seconds(least))
    best, best_s = len(order), step_s
    for kept in range(len(order) - 1, 0, -1):
        if step_times[order[kept]].seconds(least) + communication_s < best_s:
            break  # this rank, and each before it, is done before the others
        ranks = sorted(order[:kept])
        caps = None if limits.max_samples is None else tuple(limits.max_samples[rank] for rank in ranks)
        times = [step_times[rank] for rank in ranks]
        try:
            plan = solve_batch(times, batch, replace(limits, max_samples=caps))
        except InfeasiblePlanError:
            break
        without_s = predicted_step_s(times, plan) + communication_s
        if without_s < best_s:
            best, best_s = kept, without_s
    return tuple(sorted(order[best:])), best_s


def rounding_loss(
    step_times: Sequence[StepTime], plan: BatchPlan, limits: BatchLimits, communication_s: float
) -> float:
    """Return the part of a step that is lost to whole samples: against the same batch in a thousandth of the unit.

    Args:
        step_times: expected step time of each rank, shape ``(world_size,)``.
        plan: its global batch is divided anew, in samples and in thousandths.
        limits: what the division into samples has to respect.
        communication_s: what a step takes besides the slowest rank's own time.
    """
    fine = 1000
    times = [StepTime(time.overhead_s, time.seconds_per_sample / fine) for time in step_times]
    caps = None if limits.max_samples is None else tuple(n * fine for n in limits.max_samples)
    # each rank has the one sample that it needs in any case
    divided = solve_batch(times, plan.global_batch_size * fine, BatchLimits(caps), min_samples=fine)
    fine_s = predicted_step_s(times, divided) + communication_s
    whole = solve_batch(step_times, plan.global_batch_size, limits, min_samples=1)
    return 1.0 - fine_s / (predicted_step_s(step_times, whole) + communication_s)


def enough_global_batch_size(
    step_times: Sequence[StepTime], plan: BatchPlan, limits: BatchLimits, communication_s: float, part: float
) -> int | None:
    """Return the first doubling of the global batch at which rounding costs no more than ``part``.

    Args:
        step_times: expected step time of each rank, shape ``(world_size,)``.
        plan: where the doubling starts.
        limits: what a plan has to respect; ``max_samples`` does not count, for it is of the present batch.
        communication_s: what a step takes besides the slowest rank's own time.
        part: of a step.

    Returns:
        The global batch; None where ten doublings are not enough.
    """
    free = replace(limits, max_samples=None)
    for doublings in range(1, 11):
        larger = BatchPlan(tuple(n << doublings for n in plan.samples))
        if rounding_loss(step_times, larger, free, communication_s) <= part:
            return larger.global_batch_size
    return None
