"""Find the stages of replicas from the time that each rank takes for each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_hetero.balance.pipeline.replicas.given import (
    plan_of_groups,
    replicas_of_speeds,
    uniform_groups,
    uniform_replicas,
)
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule
from lightning_hetero.distributed.collectives import decide_on_rank_zero
from lightning_hetero.distributed.pipeline.chain import LayerCalls
from lightning_hetero.distributed.pipeline.layer_profile import LayerProfile, profile_layers
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.plugin.common.console import say
from lightning_hetero.plugin.pipeline.step import Example

__all__ = ["ReplicaFindings", "Wanted", "find_replicas", "first_replicas", "report_replicas"]


@dataclass(frozen=True)
class Wanted:
    """What the user has asked for.

    Attributes:
        replicas: The user's ``replicas``.
        micro_batches: Number of micro-batches per step of each replica.
        schedule: Pipeline schedule.
    """

    replicas: Any
    micro_batches: int
    schedule: Schedule

    def groups(self, world_size: int, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """Return the ranks of each replica to begin with."""
        if isinstance(self.replicas, str):
            return uniform_groups(world_size, -(-world_size // num_layers))
        if isinstance(self.replicas, int):
            return uniform_groups(world_size, self.replicas)
        return tuple(tuple(int(rank) for rank in group) for group in self.replicas)


@dataclass(frozen=True)
class ReplicaFindings:
    """The measurements and what follows from them.

    Attributes:
        plan: The replicas and their stages.
        costs: Time that each rank takes for each layer and a micro-batch of equal shares.
        transfer_s: Seconds that a transfer between two stages takes.
        step_s: Predicted seconds of a step, without what adding up the gradients takes.
        training: Whether the predictions are for training steps.
    """

    plan: ReplicaPlan
    costs: LayerCosts
    transfer_s: float
    step_s: float
    training: bool


def first_replicas(
    num_layers: int, world_size: int, wanted: Wanted, speeds: Sequence[float] | None, found: ReplicaPlan | None
) -> ReplicaPlan:
    """Return the replicas to begin with.

    Args:
        num_layers: Number of layers of the model.
        world_size: Number of ranks.
        wanted: What the user has asked for.
        speeds: The user's ``speeds`` of the ranks, or None.
        found: What an earlier run has found; None if there is nothing.
    """
    groups = wanted.groups(world_size, num_layers)
    if speeds is not None:
        return replicas_of_speeds(num_layers, groups, speeds, wanted.micro_batches, wanted.schedule)
    fits = found is not None and (found.world_size, found.num_layers) == (world_size, num_layers)
    return found if found is not None and fits else uniform_replicas(num_layers, groups)


def find_replicas(
    placement: TensorPlacement,
    calls: LayerCalls,
    example: Example,
    wanted: Wanted,
    device: torch.device,
    budget_bytes: float | None,
    state_per_parameter: float,
) -> ReplicaFindings:
    """Return the replicas with the best stages; every rank must call this at the same point.

    Args:
        placement: Current placement of the layers.
        calls: All layers of the model and how they are called.
        example: A micro-batch to time the layers with, as large as each would be with equal shares.
        wanted: What the user has asked for.
        device: Device on which this rank computes.
        budget_bytes: Memory that this rank may use, in bytes; None if it is unknown.
        state_per_parameter: Number of values that the optimisers keep for each trained value.

    Raises:
        InfeasiblePlanError: The layers do not fit into the ranks' memory; raised on every rank.
    """
    profile = profile_layers(placement, calls, example.call, example.loss_of, device)
    numbers = [inf if budget_bytes is None else budget_bytes, *profile.to_numbers()]
    groups = wanted.groups(placement.plan.world_size, placement.plan.num_layers)
    return decide_on_rank_zero(numbers, _decision(groups, example, wanted, state_per_parameter))


def _decision(
    groups: Sequence[Sequence[int]], example: Example, wanted: Wanted, state_per_parameter: float
) -> Callable[[list[list[float]]], ReplicaFindings]:
    def decide(rows: list[list[float]]) -> ReplicaFindings:
        profiles = [LayerProfile.from_numbers(row[1:]) for row in rows]
        backward = [p.backward_s if example.training else (0.0,) * len(p.backward_s) for p in profiles]
        costs = LayerCosts(tuple(p.forward_s for p in profiles), tuple(backward))
        budgets = tuple(row[0] for row in rows)
        memory, kept = None, profiles[0]
        if min(budgets) < inf:
            of_layers = zip(kept.parameter_bytes, kept.constant_bytes, strict=True)
            memory = StageMemory(
                # parameters, gradients, and once more while they are added up
                weights_bytes=tuple(trained * (3 + state_per_parameter) + constant for trained, constant in of_layers),
                activations_bytes=tuple(float(n) for n in kept.activations_bytes),
                budgets_bytes=budgets,
                micro_batches=wanted.micro_batches,
                schedule=wanted.schedule,
                received_bytes=tuple(float(wanted.micro_batches * n) for n in kept.boundary_bytes),
            )
        transfer_s = profiles[0].transfer_s
        plan, step_s = plan_of_groups(groups, costs, wanted.micro_batches, wanted.schedule, transfer_s, memory)
        return ReplicaFindings(plan, costs, transfer_s, step_s, example.training)

    return decide


def report_replicas(trainer: Trainer, findings: ReplicaFindings) -> None:
    """Print the replicas that were found, and the prediction for them."""
    total = sum(replica.share for replica in findings.plan.replicas)
    for number, replica in enumerate(findings.plan.replicas):
        order = [replica.ranks[rank] for rank in replica.stages.ranks]
        layers = [len(replica.stages.layers(stage)) for stage in range(replica.stages.num_stages)]
        say(
            trainer,
            f"hetero_pipeline: replica {number} has {layers} layers on ranks {order}, and {replica.share / total:.0%}"
            f" of the samples",
        )
    say(
        trainer,
        f"hetero_pipeline: a step of {len(findings.plan.replicas)} replicas is predicted to take"
        f" {findings.step_s:.3g} s, without what adding up their gradients takes",
    )
