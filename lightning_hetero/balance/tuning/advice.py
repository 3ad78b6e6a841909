"""Predict from step times how good a plan is, and advise the user what would be better.

A rank alone could process n / t(n) samples per second, where n is its mini-batch and t(n) its step time.  The sum over
the ranks is the bound, which the ranks would reach if none ever waited.  The efficiency is the predicted samples per
second divided by this bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTime, WindowTiming
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["Advice", "advise", "enough_global_batch_size", "predicted_efficiency", "rounding_loss"]

# Mini-batches that differ by this factor show how a rank's time depends on them.
_OTHER_SIZE = 1.5
# Times that follow the sizes by less than this part of what proportional times would do do not depend on them.
_CONSTANT = 0.1


@dataclass(frozen=True)
class Advice:
    """The prediction for a plan and its alternatives.

    Attributes:
        step_s: Seconds per step under the plan, including communication.
        speed_up: Samples per second under the plan, divided by those under equal shares.
        efficiency: Samples per second under the plan, divided by the bound.
        ranks_to_drop: Ranks without which a step would be faster by more than ``min_gain``, in ascending order.
        speed_up_without: Samples per second without these ranks, divided by those under the plan; 1 if there are none.
        rounding: Fraction of a step that is lost because samples come in whole multiples.
        enough_global_batch_size: Global batch size at which rounding loses at most ``min_gain``; None if it does so
            already.
        constant: Whether no rank's own time depends on the size of its mini-batch, as far as it was measured.
    """

    step_s: float
    speed_up: float
    efficiency: float
    ranks_to_drop: tuple[int, ...]
    speed_up_without: float
    rounding: float
    enough_global_batch_size: int | None
    constant: bool = False

    def sentences(self) -> list[str]:
        """Return notes for the user on what to change; empty if there is nothing to change."""
        found = []
        if self.constant:
            found.append(
                "a step takes each rank the same time whatever the size of its mini-batch, so no shares make it faster;"
                ' if the module computes a fixed amount in each step, use strategy="ddp"'
            )
        if self.ranks_to_drop:
            names = ", ".join(map(str, self.ranks_to_drop))
            ranks, each = ("rank", "it") if len(self.ranks_to_drop) == 1 else ("ranks", "each of them")
            found.append(
                f"without {ranks} {names} a step would be {self.speed_up_without - 1:.0%} faster: even one sample takes"
                f" {each} longer than the other ranks need for all samples"
            )
        if self.enough_global_batch_size is not None:
            found.append(
                f"the global batch is too small for the ratio of speeds: rounding to whole samples costs"
                f" {self.rounding:.0%} of a step; use a global batch of about {self.enough_global_batch_size} samples"
                f" or more"
            )
        return found


def advise(
    step_times: Sequence[StepTime],
    plan: BatchPlan,
    limits: BatchLimits,
    communication_s: float = 0.0,
    min_gain: float = 0.05,
    before: Sequence[WindowTiming] = (),
    after: Sequence[WindowTiming] = (),
) -> Advice:
    """Predict how good ``plan`` is, and whether fewer ranks or a larger global batch would be better.

    Args:
        step_times: Expected step time of each rank, shape ``(world_size,)``.
        plan: Plan to evaluate.
        limits: Limits that every plan must respect.
        communication_s: Seconds that a step takes in addition to the slowest rank's own time.
        min_gain: Smallest gain that is worth mentioning, as a fraction of the samples per second.
        before: One window per rank under the first plan; empty if there is none.
        after: One window per rank under the plan that was found; empty if there is none.

    Example:
        >>> times = [StepTime(0.0, 0.001), StepTime(0.0, 0.002), StepTime(0.5, 0.001)]
        >>> advise(times, BatchPlan((63, 32, 1)), BatchLimits()).ranks_to_drop
        (2,)
    """
    batch = plan.global_batch_size
    step_s = predicted_step_s(step_times, plan) + communication_s
    equal = proportional_plan([1.0] * plan.world_size, batch, limits, min_samples=1)
    dropped, without_s = _ranks_to_drop(step_times, batch, limits, step_s, communication_s)
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
        constant=0 < len(before) == len(after) and _are_constant(before, after),
    )


def _are_constant(before: Sequence[WindowTiming], after: Sequence[WindowTiming]) -> bool:
    """Return whether the times of ranks have not followed their mini-batches, all of which have changed."""
    sizes = [b.samples / max(a.samples, 1) for a, b in zip(before, after, strict=True)]
    times = [b.own_s / max(a.own_s, 1e-12) for a, b in zip(before, after, strict=True)]
    if any(max(size, 1.0) < _OTHER_SIZE * min(size, 1.0) for size in sizes):
        return False
    # the slope by least squares: 0 for constant times, 1 for proportional ones
    slope = sum((t - 1.0) * (n - 1.0) for t, n in zip(times, sizes, strict=True)) / sum((n - 1.0) ** 2 for n in sizes)
    return slope < _CONSTANT


def predicted_efficiency(step_times: Sequence[StepTime], plan: BatchPlan, communication_s: float = 0.0) -> float:
    """Return the samples per second under a plan, divided by the sum of what each rank would process alone.

    Args:
        step_times: Expected step time of each rank, shape ``(world_size,)``.
        plan: Plan to evaluate.
        communication_s: Seconds that a step takes in addition to the slowest rank's own time.
    """
    step_s = predicted_step_s(step_times, plan) + communication_s
    alone = sum(n / time.seconds(n) for time, n in zip(step_times, plan.samples, strict=True) if n)
    return plan.global_batch_size / step_s / alone


def _ranks_to_drop(
    step_times: Sequence[StepTime], batch: int, limits: BatchLimits, step_s: float, communication_s: float
) -> tuple[tuple[int, ...], float]:
    """Return the ranks to drop and the seconds per step without them; the slowest with one multiple go first."""
    least = limits.batch_multiple
    order = sorted(range(len(step_times)), key=lambda rank: step_times[rank].seconds(least))
    best, best_s = len(order), step_s
    for kept in range(len(order) - 1, 0, -1):
        if step_times[order[kept]].seconds(least) + communication_s < best_s:
            break  # this rank, and each faster one, finishes before the others
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
    """Return the fraction of a step that is lost to whole multiples, compared with thousandths of a sample.

    Args:
        step_times: Expected step time of each rank, shape ``(world_size,)``.
        plan: Plan whose global batch is divided again, in whole samples and in thousandths.
        limits: Limits that the division into samples must respect.
        communication_s: Seconds that a step takes in addition to the slowest rank's own time.
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
    """Return the first doubling of the global batch at which rounding costs at most ``part`` of a step.

    Args:
        step_times: Expected step time of each rank, shape ``(world_size,)``.
        plan: Plan whose global batch is doubled.
        limits: Limits that a plan must respect; ``max_samples`` is ignored, because it holds for the current batch.
        communication_s: Seconds that a step takes in addition to the slowest rank's own time.
        part: Fraction of a step that rounding may cost.

    Returns:
        The size of the global batch; None if ten doublings are not enough.
    """
    free = replace(limits, max_samples=None)
    for doublings in range(1, 11):
        larger = BatchPlan(tuple(n << doublings for n in plan.samples))
        if rounding_loss(step_times, larger, free, communication_s) <= part:
            return larger.global_batch_size
    return None
