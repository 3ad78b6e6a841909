"""Choose the stages of a pipeline from what was measured: solve, then judge by a simulation of the schedule."""

from __future__ import annotations

from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
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

    The plan whose slowest stage is fastest is where the search starts, and the uniform one, which may be better with
    few micro-batches; both are improved by single moves.

    Args:
        costs: of every layer on every rank, for one micro-batch.
        micro_batches: of a step.
        schedule: the order of passes.
        transfer_s: what a transfer between stages takes.
        memory: what has to fit; None where nothing is known of it.
        last_rank: the rank of the last stage.

    Raises:
        ConfigurationError: there are fewer layers than ranks.
        InfeasiblePlanError: the layers do not fit into the memories.
    """
    uniform = uniform_stages(costs.num_layers, costs.world_size, last_rank)
    starts = [solve_stages(costs, memory, last_rank)]
    if memory is None or memory.allows(uniform):
        starts.append(uniform)
    plans = [refine_stages(costs, start, micro_batches, schedule, memory, transfer_s) for start in starts]
    return min(
        plans,
        key=lambda plan: simulate_pipeline(costs.of_stages(plan), micro_batches, schedule, transfer_s).step_s,
    )
