"""Replicas to begin with, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stage_solver import solve_stages, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule

__all__ = ["replicas_of_speeds", "uniform_groups", "uniform_replicas"]


def uniform_groups(world_size: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of ``count`` replicas that differ by at most one rank; rank 0 is the first of the first one.

    Example:
        >>> uniform_groups(5, 2)
        ((0, 2, 4), (1, 3))
    """
    return tuple(tuple(range(first, world_size, count)) for first in range(count))


def uniform_replicas(num_layers: int, groups: Sequence[Sequence[int]]) -> ReplicaPlan:
    """Return replicas with equal numbers of layers on their ranks, and shares in proportion to their ranks.

    The first rank of each has its last stage.
    """
    return ReplicaPlan(
        tuple(Replica(tuple(ranks), uniform_stages(num_layers, len(ranks)), float(len(ranks))) for ranks in groups)
    )


def replicas_of_speeds(
    num_layers: int, groups: Sequence[Sequence[int]], speeds: Sequence[float], micro_batches: int, schedule: Schedule
) -> ReplicaPlan:
    """Return replicas whose ranks have layers in proportion to their speeds, and samples as their stages allow.

    Args:
        num_layers: Number of layers.
        groups: The ranks of each replica.
        speeds: Speed of each rank of the run.
        micro_batches: Number of micro-batches per step of each replica.
        schedule: Pipeline schedule.
    """
    costs = LayerCosts.of_speeds([(1.0, 2.0)] * num_layers, speeds)
    replicas = []
    for uniform in uniform_replicas(num_layers, groups).replicas:
        own = uniform.costs(costs)
        stages = solve_stages(own)
        step_s = simulate_pipeline(own.of_stages(stages), micro_batches, schedule).step_s
        replicas.append(Replica(uniform.ranks, stages, 1 / step_s))
    return ReplicaPlan(tuple(replicas))
