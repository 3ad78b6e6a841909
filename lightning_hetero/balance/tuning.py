"""Which plan to follow next, given what the ranks measured so far.

The step times of all ranks are fitted (``step_time``) and the global batch is divided anew (``batch_solver``).  Whether
that is worth a change is judged against the plan that the run began with: where the best plan is not ``min_gain``
faster than that one, the run goes back to it, since a split that differs by noise alone is no improvement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_hetero.balance.batch_solver import predicted_step_s, solve_batch
from lightning_hetero.balance.step_time import fit_step_time, trimmed_mean
from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTime, StepTiming
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["Proposal", "TuningWindows", "propose", "review", "windows_for"]

# After a change of size the allocator and the autotuner of the device see new shapes.
_SETTLE_STEPS = 1
_WINDOWS = 3


@dataclass(frozen=True)
class TuningWindows:
    """How the tuning steps are divided.

    Attributes:
        measured_steps: steps to measure in each window, one entry a window; between two windows the plan may change.
        settle_steps: steps after a change of plan that are not measured.
    """

    measured_steps: tuple[int, ...]
    settle_steps: int


@dataclass(frozen=True)
class Proposal:
    """What the measurements suggest.

    Attributes:
        plan: the plan to follow from now on; the present one where nothing is to be changed.
        step_times: fitted step time of each rank, shape ``(world_size,)``.
        gain: how much faster ``plan`` is than the plan that the run began with; 0.25 is a quarter more samples/s.
        settled: whether further measuring would not change the plan.
    """

    plan: BatchPlan
    step_times: tuple[StepTime, ...]
    gain: float
    settled: bool


def windows_for(tune_steps: int) -> TuningWindows:
    """Divide ``tune_steps`` into windows of different splits.

    Two sizes a rank are needed to tell overhead from cost: the first window runs the initial plan, the second the
    proportional correction, the third measures at the fitted optimum.

    Args:
        tune_steps: steps to spend; below 8 there is one window only, and the correction stays proportional.

    Returns:
        The windows; together with the settling steps between them they last ``tune_steps``.

    Raises:
        ConfigurationError: ``tune_steps`` is less than 1.

    Example:
        >>> windows_for(20).measured_steps
        (6, 6, 6)
    """
    if tune_steps < 1:
        raise ConfigurationError(f"`tune_steps` must be at least 1, got {tune_steps}.")
    if tune_steps < 8:
        return TuningWindows((tune_steps,), _SETTLE_STEPS)
    measured = tune_steps - (_WINDOWS - 1) * _SETTLE_STEPS
    later = measured // _WINDOWS
    return TuningWindows((measured - (_WINDOWS - 1) * later, *([later] * (_WINDOWS - 1))), _SETTLE_STEPS)


def propose(
    timings: Sequence[Sequence[StepTiming]],
    initial: BatchPlan,
    current: BatchPlan,
    limits: BatchLimits,
    min_gain: float,
) -> Proposal:
    """Fit the step times of all ranks and propose a plan.

    Args:
        timings: measured steps of each rank, shape ``(world_size, steps)``; steps may differ in number.
        initial: the plan that the run began with.
        current: the plan that holds now, of the same global batch.
        limits: what every plan has to respect.
        min_gain: least predicted gain over ``initial`` that justifies another plan.

    Returns:
        The proposal. Without a usable measurement of every rank it is ``current``, settled, with no step times:
        a plan built on guesses could be slower than the one that runs.
    """
    if not all(any(timing.samples > 0 and timing.own_s > 0 for timing in rank) for rank in timings):
        return Proposal(plan=current, step_times=(), gain=0.0, settled=True)
    step_times = tuple(fit_step_time(rank) for rank in timings)
    best = solve_batch(step_times, current.global_batch_size, limits, min_samples=1)
    gain = _gain(timings, step_times, initial, best)
    if gain <= min_gain:
        # a run that has left the initial plan and finds no gain may see a disturbance of one window: measure on
        return Proposal(plan=initial, step_times=step_times, gain=0.0, settled=current == initial)
    return Proposal(plan=best, step_times=step_times, gain=gain, settled=best == current)


def review(
    timings: Sequence[Sequence[StepTiming]],
    initial: BatchPlan,
    current: BatchPlan,
    limits: BatchLimits,
    min_gain: float,
) -> Proposal:
    """Judge the plan that the tuning ended with by all that is measured, the steps under that plan included.

    Args:
        timings: as in :func:`propose`.
        initial: as in :func:`propose`.
        current: as in :func:`propose`.
        limits: as in :func:`propose`.
        min_gain: as in :func:`propose`, and least predicted gain over ``current`` that justifies one more change.

    Returns:
        ``current``, unless the gain over ``initial`` was noise (then ``initial``) or another plan is clearly better.
    """
    proposal = propose(timings, initial, current, limits, min_gain)
    if proposal.plan in (initial, current) or _gain(timings, proposal.step_times, current, proposal.plan) > min_gain:
        return proposal
    return replace(proposal, plan=current, settled=True)


def _gain(
    timings: Sequence[Sequence[StepTiming]], step_times: Sequence[StepTime], old: BatchPlan, new: BatchPlan
) -> float:
    """Predict how many more samples a second ``new`` processes than ``old``, as a part of those of ``old``."""
    # all ranks wait for the slowest; what that one waits is the communication itself, which no plan removes
    communication_s = min(trimmed_mean([timing.waiting_s for timing in rank]) for rank in timings)
    old_s, new_s = predicted_step_s(step_times, old), predicted_step_s(step_times, new)
    return (old_s + communication_s) / (new_s + communication_s) - 1.0
