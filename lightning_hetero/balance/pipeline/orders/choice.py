"""Choose between the ways to run a pipeline: the simplest one whose step is predicted to be nearly the shortest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from lightning_hetero.balance.pipeline.orders.order import Order, known_order
from lightning_hetero.balance.pipeline.orders.proof import most_micro_batches
from lightning_hetero.balance.pipeline.orders.search import (
    OrderPlan,
    OrderProblem,
    plan_order,
    straight_shapes,
    v_shapes,
)
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.simulation import pipeline_step_s
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["PipelineChoice", "choose_order", "problem_of_way"]

_NEARLY = 1.02  # times as long as the shortest step: worth being simpler
_EFFORT_OF_ADVICE = 20_000  # it need not be as close as what is run
_SHORT_PASS_S = 0.003  # what it takes to send more messages is then no longer small


@dataclass(frozen=True)
class PipelineChoice:
    """Stages and how they are run.

    Attributes:
        name: Short name: "1f1b", "v", and with backward passes in two parts "split" and "split v"; with layers that two
            ranks share "shared v", "shared split" and "shared split v".
        stages: The stages.
        order: The passes of each rank; None for "1f1b".
        step_s: Predicted seconds per step.
        reason: What was compared, for the user.
        one_by_one: The best stages for "1f1b", which take its place if its steps take longer than predicted; None if
            they do not fit into memory or were not wanted, and if this is "1f1b".
    """

    name: str
    stages: StagePlan
    order: Order | None
    step_s: float
    reason: str
    one_by_one: StagePlan | None = None


def choose_order(problem: OrderProblem, *, always_v: bool = False) -> PipelineChoice:
    """Return the simplest way to run a pipeline of those whose step is at most 2 % longer than the shortest.

    Args:
        problem: What is known. Backward passes are split, and layers are shared, only where it allows that.
        always_v: Whether only a V is wanted, if there can be one. Then no layer is shared.

    Raises:
        ConfigurationError: There are fewer layers than ranks.
        InfeasiblePlanError: The layers do not fit into the memory of the ranks in any way.
    """
    found: list[PipelineChoice] = []
    error: InfeasiblePlanError | None = None
    try:
        found.append(_one_by_one(problem))
    except InfeasiblePlanError as raised:
        error = raised
    is_short = bool(found) and _longest_forward_s(problem, found[0].stages) < _SHORT_PASS_S
    if always_v or not is_short:
        found += _planned(problem)
    if not always_v and not is_short and problem.shared:
        found += _planned_with_shared(problem, min((one.step_s for one in found), default=inf))
    if always_v:
        found = [one for one in found if one.name in ("v", "split v")] or found
    if not found:
        assert error is not None
        raise error
    shortest_s = min(one.step_s for one in found)
    chosen = next(one for one in found if one.step_s <= _NEARLY * shortest_s)
    order = chosen.order or known_order(chosen.stages.ranks, problem.micro_batches, "1f1b")
    compared = ", ".join(f"{one.name} {1e3 * one.step_s:.0f} ms" for one in found)
    is_last = chosen is found[-1]
    reason = (
        f'schedule "{chosen.name}", {problem.limit_s / chosen.step_s:.0%} of the limit of'
        f" {1e3 * problem.limit_s:.0f} ms per step; predicted were {compared}"
        + (", and passes are too short for others" if is_short and not always_v else "")
        + (", and it is the simplest within 2 % of the shortest" if len(found) > 1 and not is_last else "")
        + f"; a rank holds at most {most_micro_batches(order)} micro-batches"
        + _shared_by(chosen.stages, problem.micro_batches)
        + (_what_more_brings(problem, chosen) if chosen.order is not None else "")
    )
    other = None if always_v or chosen.order is None or found[0].order is not None else found[0].stages
    return replace(chosen, reason=reason, one_by_one=None if other == chosen.stages else other)


def _one_by_one(problem: OrderProblem) -> PipelineChoice:
    costs, count = problem.costs, problem.micro_batches
    stages = plan_pipeline(costs, count, "1f1b", problem.transfer_s, problem.memory, problem.last_rank)
    step_s = pipeline_step_s(costs.of_stages(stages), count, "1f1b", problem.transfer_s)
    return PipelineChoice("1f1b", stages, None, step_s, "")


def _planned(problem: OrderProblem) -> Iterator[PipelineChoice]:
    """Yield plans that a search has found, in which each layer has one rank, the simplest first."""
    for name in ("v", "split", "split v") if problem.split else ("v",):
        plan = _plan(replace(problem, shared=()), name)
        if plan is not None:
            yield PipelineChoice(name, plan.stages, plan.order, plan.step_s, "")


def _planned_with_shared(problem: OrderProblem, shortest_s: float) -> Iterator[PipelineChoice]:
    """Yield plans with shared layers that are more than 2 % faster than all simpler ones."""
    for name in ("shared v", "shared split", "shared split v") if problem.split else ("shared v",):
        if problem.limit_s >= shortest_s / _NEARLY:
            break
        plan = _plan(problem, name)
        if plan is not None and plan.step_s < shortest_s / _NEARLY:
            shortest_s = plan.step_s
            yield PipelineChoice(name, plan.stages, plan.order, plan.step_s, "")


def _plan(problem: OrderProblem, name: str, effort: int | None = None) -> OrderPlan | None:
    """Return the best plan of a way to run a pipeline; None if there is none."""
    shapes = (v_shapes if "v" in name.split() else straight_shapes)(problem.costs, problem.last_rank)
    return plan_order(problem_of_way(problem, name), shapes, effort=effort) if shapes else None


def problem_of_way(problem: OrderProblem, name: str) -> OrderProblem:
    """Return what the search for a way to run a pipeline is about.

    Args:
        problem: What is known.
        name: Name of the way, as in :class:`PipelineChoice`.
    """
    parts = name.split()
    return replace(problem, split="split" in parts, shared=problem.shared if "shared" in parts else ())


def _shared_by(stages: StagePlan, micro_batches: int) -> str:
    borders = zip(stages.ends, stages.lent, pairwise(stages.ranks), strict=False)
    return "".join(
        f"; ranks {before} and {after} share layer {layer} ({len(lent)} and {micro_batches - len(lent)} micro-batches)"
        for layer, lent, (before, after) in borders
        if lent
    )


def _what_more_brings(problem: OrderProblem, chosen: PipelineChoice) -> str:
    """Say what the same way would reach with more micro-batches, and with memory for all of them."""
    costs, m = problem.costs, problem.micro_batches
    memory = problem.memory
    half = memory and replace(memory, activations_bytes=tuple(b / 2 for b in memory.activations_bytes))
    found = []
    for what, other in (
        (
            f"{2 * m} micro-batches",
            replace(problem, costs=costs.times([0.5] * costs.world_size), micro_batches=2 * m, memory=half),
        ),
        (f"memory for all {m}", replace(problem, memory=None, most_held=None)),
    ):
        plan = _plan(other, chosen.name, _EFFORT_OF_ADVICE)
        if plan is not None and plan.step_s < chosen.step_s / _NEARLY:
            found.append(f"{what} would reach {other.limit_s / plan.step_s:.0%}")
    return f"; {', '.join(found)}" if found else "; neither more micro-batches nor more memory would bring 2 %"


def _longest_forward_s(problem: OrderProblem, stages: StagePlan) -> float:
    return max(problem.costs.of_stages(stages).forward_s)
