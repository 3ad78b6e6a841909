"""Choose between the ways to run a pipeline: the simplest one whose step is predicted to be nearly the shortest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_hetero.balance.pipeline.orders.order import Order, known_order
from lightning_hetero.balance.pipeline.orders.proof import most_micro_batches
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, plan_order, straight_shapes, v_shapes
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["PipelineChoice", "choose_order"]

_NEARLY = 1.02  # times as long as the shortest step: worth being simpler
_SHORT_PASS_S = 0.003  # what it takes to send more messages is then no longer small


@dataclass(frozen=True)
class PipelineChoice:
    """Stages and how they are run.

    Attributes:
        name: Short name: "1f1b", "v", and with backward passes in two parts "split" and "split v".
        stages: The stages.
        order: The passes of each rank; None for "1f1b".
        step_s: Predicted seconds per step.
        reason: What was compared, for the user.
    """

    name: str
    stages: StagePlan
    order: Order | None
    step_s: float
    reason: str


def choose_order(problem: OrderProblem, *, always_v: bool = False) -> PipelineChoice:
    """Return the simplest way to run a pipeline of those whose step is at most 2 % longer than the shortest.

    Args:
        problem: What is known. Backward passes are split only where ``problem.split`` allows it.
        always_v: Whether only a V is wanted, if there can be one.

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
    if always_v:
        found = [one for one in found if one.name in ("v", "split v")] or found
    if not found:
        assert error is not None
        raise error
    shortest_s = min(one.step_s for one in found)
    chosen = next(one for one in found if one.step_s <= _NEARLY * shortest_s)
    order = chosen.order or known_order(chosen.stages.ranks, problem.micro_batches, "1f1b")
    compared = ", ".join(f"{one.name} {1e3 * one.step_s:.0f} ms" for one in found)
    reason = (
        f'schedule "{chosen.name}", {problem.limit_s / chosen.step_s:.0%} of the limit of'
        f" {1e3 * problem.limit_s:.0f} ms per step; predicted were {compared}"
        + (", and passes are too short for others" if is_short and not always_v else "")
        + f"; a rank holds at most {most_micro_batches(order)} micro-batches"
    )
    return replace(chosen, reason=reason)


def _one_by_one(problem: OrderProblem) -> PipelineChoice:
    costs, count = problem.costs, problem.micro_batches
    stages = plan_pipeline(costs, count, "1f1b", problem.transfer_s, problem.memory, problem.last_rank)
    step_s = simulate_pipeline(costs.of_stages(stages), count, "1f1b", problem.transfer_s).step_s
    return PipelineChoice("1f1b", stages, None, step_s, "")


def _planned(problem: OrderProblem) -> Iterator[PipelineChoice]:
    """Yield plans that a search has found, the simplest first."""
    straight = straight_shapes(problem.costs, problem.last_rank)
    both_ends = v_shapes(problem.costs, problem.last_rank)
    ways = [("v", both_ends, False)]
    if problem.split:
        ways += [("split", straight, True), ("split v", both_ends, True)]
    for name, shapes, split in ways:
        plan = plan_order(replace(problem, split=split), shapes) if shapes else None
        if plan is not None:
            yield PipelineChoice(name, plan.stages, plan.order, plan.step_s, "")


def _longest_forward_s(problem: OrderProblem, stages: StagePlan) -> float:
    return max(problem.costs.of_stages(stages).forward_s)
