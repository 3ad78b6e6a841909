"""Stages and shares of replicas whose ranks are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stage_solver import StageMemory, solve_stages, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StagePlan

__all__ = ["plan_of_groups", "replicas_of_speeds", "uniform_groups", "uniform_replicas"]

_ROUNDS = 3  # of stages from shares and shares from stages


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


def plan_of_groups(
    groups: Sequence[Sequence[int]],
    costs: LayerCosts,
    micro_batches: int,
    schedule: Schedule = "1f1b",
    transfer_s: float = 0.0,
    memory: StageMemory | None = None,
) -> tuple[ReplicaPlan, float]:
    """Return the replicas with the best stages of each, and the seconds of a step.

    Each gets samples in proportion to its throughput, so that all take equally long. The first rank of each has its
    last stage.

    Args:
        groups: The ranks of each replica.
        costs: Time of every layer on every rank, for one of the micro-batches if all replicas had equally many samples.
        micro_batches: Number of micro-batches per step of each replica.
        schedule: Pipeline schedule.
        transfer_s: Seconds that a transfer between two stages takes.
        memory: Memory needs for one of these micro-batches, and budgets of all ranks; None if unknown.

    Raises:
        ConfigurationError: There are fewer layers than ranks in a replica.
        InfeasiblePlanError: The layers do not fit into the memory of a replica's ranks.
    """
    found = uniform_replicas(costs.num_layers, groups)
    parts = [replica.costs(costs) for replica in found.replicas]
    larger = [1.0] * len(groups)  # than a micro-batch of equal shares
    step_s = [0.0] * len(groups)
    for _ in range(_ROUNDS if memory is not None else 1):
        stages: list[StagePlan] = []
        for number, own in enumerate(parts):
            needs = None if memory is None else _of_replica(memory, groups[number], larger[number])
            stages.append(plan_pipeline(own, micro_batches, schedule, transfer_s, needs))
            simulated = simulate_pipeline(own.of_stages(stages[-1]), micro_batches, schedule, transfer_s)
            step_s[number] = simulated.step_s
        speeds = [1 / max(seconds, 1e-12) for seconds in step_s]
        larger = [len(groups) * speed / sum(speeds) for speed in speeds]
    replicas = tuple(
        Replica(tuple(ranks), own, share) for ranks, own, share in zip(groups, stages, larger, strict=True)
    )
    return ReplicaPlan(replicas), max(seconds * times for seconds, times in zip(step_s, larger, strict=True))


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


def _of_replica(memory: StageMemory, ranks: Sequence[int], larger: float) -> StageMemory:
    """Return the needs and budgets of a replica whose micro-batches are ``larger`` times as large."""
    return replace(
        memory,
        activations_bytes=tuple(larger * size for size in memory.activations_bytes),
        received_bytes=tuple(larger * size for size in memory.received_bytes),
        budgets_bytes=tuple(memory.budgets_bytes[rank] for rank in ranks),
    )
