"""Choose the stages of a pipeline from measured times: solve, then compare in a simulation of the schedule."""

from __future__ import annotations

from lightning_hetero.balance.pipeline.simulation import pipeline_step_s
from lightning_hetero.balance.pipeline.stage_solver import StageMemory, refine_stages, solve_stages, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StagePlan

__all__ = ["plan_pipeline"]


def plan_pipeline(
    costs: LayerCosts,
    micro_batches: int,
    schedule: Schedule = "1f1b",
    transfer_s: float = 0.0,
    memory: StageMemory | None = None,
    last_rank: int = 0,
) -> StagePlan:
    """Return the plan with the shortest simulated step that was found.

    The search starts from the plan whose slowest stage is fastest, and from the uniform plan, which may be better with
    few micro-batches.  It improves both by single moves.

    Args:
        costs: Time of every layer on every rank, for one micro-batch.
        micro_batches: Number of micro-batches per step.
        schedule: Pipeline schedule.
        transfer_s: Seconds that a transfer between two stages takes.
        memory: Memory needs and budgets that a plan must respect; None if unknown.
        last_rank: Rank of the last stage.

    Raises:
        ConfigurationError: There are fewer layers than ranks.
        InfeasiblePlanError: The layers do not fit into the memory of the ranks.
    """
    uniform = uniform_stages(costs.num_layers, costs.world_size, last_rank)
    starts = [solve_stages(costs, memory, last_rank)]
    if memory is None or memory.allows(uniform):
        starts.append(uniform)
    plans = [refine_stages(costs, start, micro_batches, schedule, memory, transfer_s) for start in starts]
    return min(
        plans,
        key=lambda plan: pipeline_step_s(costs.of_stages(plan), micro_batches, schedule, transfer_s),
    )
