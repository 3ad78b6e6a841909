"""Find the stages of replicas from the time that each rank takes for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_hetero.balance.pipeline.measured_costs import by_size, split_where_possible, with_loss_everywhere
from lightning_hetero.balance.pipeline.orders.order import Order
from lightning_hetero.balance.pipeline.replicas.given import replicas_of_speeds, uniform_groups, uniform_replicas
from lightning_hetero.balance.pipeline.replicas.orders.ordered_solver import OrderedReplicas, solve_ordered_replicas
from lightning_hetero.balance.pipeline.replicas.orders.watched_orders import WatchedOrders
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import Link, ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.problem import Wanted as WantedGroups
from lightning_hetero.balance.pipeline.replicas.solver import ReplicaSolution, solve_replicas
from lightning_hetero.balance.pipeline.replicas.watching.problem import WatchedReplicas
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, WantedSchedule, known_schedule
from lightning_hetero.distributed.collectives import decide_on_rank_zero
from lightning_hetero.distributed.pipeline.chain import LayerCalls
from lightning_hetero.distributed.pipeline.layer_profile import LayerProfile, costs_of, moving_times_s, profile_layers
from lightning_hetero.distributed.pipeline.passes.links import pairs_of_links, timed_link
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.plugin.common.console import say
from lightning_hetero.plugin.pipeline.step import Example

__all__ = ["ReplicaFindings", "Wanted", "find_replicas", "first_replicas", "report_replicas"]

_BEFORE = 6  # numbers of a rank before those of its layers
_SAMPLES = 64  # per rank, for shares in proportion to given speeds


@dataclass(frozen=True)
class Wanted:
    """What the user has asked for.

    Attributes:
        replicas: The user's ``replicas``.
        micro_batches: Number of micro-batches per step of each replica.
        schedule: The user's ``schedule``.
    """

    replicas: Any
    micro_batches: int
    schedule: WantedSchedule

    @property
    def known_schedule(self) -> Schedule:
        """The pipeline schedule with which groupings are found, and which runs until orders are planned."""
        return known_schedule(self.schedule)

    @property
    def plans_orders(self) -> bool:
        """Whether the order of passes is planned within each replica."""
        return self.schedule in ("auto", "v")

    @property
    def of_solver(self) -> WantedGroups:
        """The number of replicas or the ranks of each, or None, as the solver takes it."""
        if isinstance(self.replicas, str):
            return None
        if isinstance(self.replicas, Sequence):
            return tuple(tuple(int(rank) for rank in group) for group in self.replicas)
        return int(self.replicas)

    def groups(self, world_size: int, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """Return the ranks of each replica to begin with, that of rank 0 first; as few as possible if not given.

        The first rank of each has its last stage. Before anything is known, one pipeline needs the least memory on each
        rank.
        """
        given = self.of_solver
        if isinstance(given, tuple):
            return tuple(sorted(given, key=min))
        return uniform_groups(world_size, -(-world_size // num_layers))

    def parts(self, world_size: int, num_layers: int) -> tuple[int, int]:
        """Return into how many parts a batch is cut to time layers with one of them, for large parts and for small.

        Large ones are what micro-batches would be with equal shares of as few replicas as there may be.
        """
        given = self.of_solver
        count = given if isinstance(given, int) else len(self.groups(world_size, num_layers))
        most = world_size if given is None else 2 * count
        return self.micro_batches * count, self.micro_batches * max(most, 2 * count)


@dataclass(frozen=True)
class ReplicaFindings:
    """The measurements and what follows from them.

    Attributes:
        plan: The replicas and their stages.
        problem: The measurements.
        solution: What is predicted for the plan.
        moving_s: Seconds that each layer takes to move, with its gradients and the state of its optimiser.
        ordered: How each replica is run, if that was chosen; None for the pipeline schedule that the user has named.
        split_layers: Numbers of the layers whose backward pass can be split.
    """

    plan: ReplicaPlan
    problem: ReplicaProblem
    solution: ReplicaSolution
    moving_s: tuple[float, ...]
    ordered: OrderedReplicas | None = None
    split_layers: tuple[int, ...] = ()

    @property
    def orders(self) -> tuple[Schedule | Order, ...]:
        """The passes of each replica: an order, or the name of a known pipeline schedule."""
        if self.ordered is None:
            return (self.problem.schedule,) * len(self.plan.replicas)
        return tuple(self.problem.schedule if order is None else order for order in self.ordered.orders)

    @property
    def watched(self) -> WatchedReplicas | WatchedOrders:
        """The measurements as the watching of the replicas needs them."""
        if self.ordered is not None and any(self.ordered.orders):
            return WatchedOrders(self.problem, self.moving_s, self.ordered)
        return WatchedReplicas(self.problem, self.moving_s)

    def changed(
        self, plan: ReplicaPlan, factors: Sequence[float], orders: tuple[Order | None, ...] | None = None
    ) -> ReplicaFindings:
        """Return the findings for a plan on devices that take ``factors`` times as long as when they were timed.

        Args:
            plan: The replicas.
            factors: Factor of each rank, rank 0 first.
            orders: The passes of each replica; None if they are as they were.
        """
        found = self
        if orders is not None and self.ordered is not None:
            ordered = replace(self.ordered, orders=orders, solution=replace(self.ordered.solution, plan=plan))
            found = replace(self, ordered=ordered)
        return replace(found, plan=plan, solution=found.watched.solution(plan, factors))


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
    if speeds is not None and isinstance(wanted.of_solver, int):
        costs = LayerCosts.of_speeds([(1.0, 2.0)] * num_layers, speeds)
        samples = _SAMPLES * world_size
        problem = ReplicaProblem(costs, samples, wanted.micro_batches, replicas=wanted.of_solver)
        return solve_replicas(problem).plan
    if speeds is not None:
        return replicas_of_speeds(num_layers, groups, speeds, wanted.micro_batches, wanted.known_schedule)
    fits = found is not None and (found.world_size, found.num_layers) == (world_size, num_layers)
    return found if found is not None and fits else uniform_replicas(num_layers, groups)


def find_replicas(
    placement: TensorPlacement,
    calls: LayerCalls,
    examples: Sequence[Example],
    wanted: Wanted,
    device: torch.device,
    nodes: Sequence[int],
    budget_bytes: float | None,
    state_per_parameter: float,
) -> ReplicaFindings:
    """Return the best replicas; every rank must call this at the same point.

    Args:
        placement: Current placement of the layers.
        calls: All layers of the model and how they are called.
        examples: A micro-batch of a training step to time the layers with, and a smaller one if there is one, which
            tells what a pass takes whatever its size.
        wanted: What the user has asked for.
        device: Device on which this rank computes.
        nodes: Node of each rank.
        budget_bytes: Memory that this rank may use, in bytes; None if it is unknown.
        state_per_parameter: Number of values that the optimisers keep for each trained value.

    Raises:
        ConfigurationError: The batch has fewer samples than there are replicas; raised on every rank.
        InfeasiblePlanError: The layers do not fit into the ranks' memory; raised on every rank.
    """
    split = wanted.plans_orders
    profiles = [profile_layers(placement, calls, one.call, one.loss_of, device, split=split) for one in examples]
    links = [seconds for pair in pairs_of_links(nodes) for seconds in timed_link(pair, device)]
    budget = inf if budget_bytes is None else budget_bytes
    numbers = [budget, float(examples[0].loss_of is not None), *links, *(n for p in profiles for n in p.to_numbers())]
    return decide_on_rank_zero(numbers, partial(_decided, nodes, examples, wanted, state_per_parameter))


def _decided(
    nodes: Sequence[int],
    examples: Sequence[Example],
    wanted: Wanted,
    state_per_parameter: float,
    rows: list[list[float]],
) -> ReplicaFindings:
    length = (len(rows[0]) - _BEFORE) // len(examples)
    of_sizes = [
        [LayerProfile.from_numbers(row[start : start + length]) for row in rows]
        for start in range(_BEFORE, len(rows[0]), length)
    ]
    profiles = of_sizes[0]
    kept, budgets = profiles[0], tuple(row[0] for row in rows)
    memory = None
    if min(budgets) < inf:
        of_layers = zip(kept.parameter_bytes, kept.constant_bytes, strict=True)
        memory = StageMemory(
            # parameters, gradients, and once more while they are added up
            weights_bytes=tuple(trained * (3 + state_per_parameter) + constant for trained, constant in of_layers),
            activations_bytes=tuple(float(n) for n in kept.activations_bytes),
            budgets_bytes=budgets,
            micro_batches=wanted.micro_batches,
            schedule=wanted.known_schedule,
            received_bytes=tuple(float(wanted.micro_batches * n) for n in kept.boundary_bytes),
        )
    within, between = (None if pair is None else rows[pair[0]] for pair in pairs_of_links(nodes))
    link = Link() if within is None else Link(*within[2:4])
    with_loss = [bool(row[1]) for row in rows]
    times, split_layers = split_where_possible([with_loss_everywhere(costs_of(of), with_loss) for of in of_sizes])
    costs, overheads = times[0], None
    if len(examples) > 1:
        costs, overheads = by_size(times[0], times[1], examples[0].size / examples[1].size)
    problem = ReplicaProblem(
        costs=costs,
        samples=examples[0].samples,
        micro_batches=wanted.micro_batches,
        micro_batch_size=examples[0].size,
        schedule=wanted.known_schedule,
        overheads=overheads,
        parameter_bytes=tuple(map(float, kept.parameter_bytes)),
        output_bytes=tuple(map(float, kept.boundary_bytes)),
        memory=memory,
        within=link,
        between=None if between is None else Link(*between[4:6]),
        nodes=tuple(nodes) if len({*nodes}) > 1 else (),
        replicas=wanted.of_solver,
    )
    moving_s = moving_times_s(profiles, state_per_parameter)
    if wanted.plans_orders:
        ordered = solve_ordered_replicas(problem, always_v=wanted.schedule == "v")
        return ReplicaFindings(ordered.solution.plan, problem, ordered.solution, moving_s, ordered, split_layers)
    solution = solve_replicas(problem)
    return ReplicaFindings(solution.plan, problem, solution, moving_s)


def report_replicas(trainer: Trainer, findings: ReplicaFindings, why_one: str | None) -> None:
    """Print the replicas that were found, and the prediction for them.

    Args:
        trainer: The Trainer.
        findings: What was found.
        why_one: Why only one pipeline was considered; None if that is not so.
    """
    if why_one is not None:
        say(trainer, f"hetero_pipeline: one pipeline, because {why_one}")
    total = sum(replica.share for replica in findings.plan.replicas)
    for number, replica in enumerate(findings.plan.replicas):
        order = [replica.ranks[rank] for rank in replica.stages.ranks]
        layers = [len(replica.stages.layers(stage)) for stage in range(replica.stages.num_stages)]
        way = "" if findings.ordered is None else f', schedule "{findings.ordered.names[number]}"'
        say(
            trainer,
            f"hetero_pipeline: replica {number} has {layers} layers on ranks {order}, and {replica.share / total:.0%}"
            f" of the samples{way}",
        )
    if findings.ordered is not None:
        say(trainer, f"hetero_pipeline: {findings.ordered.reason}")
    found = findings.solution
    say(
        trainer,
        f"hetero_pipeline: predicted {found.step_s * 1e3:.0f} ms per step, of which adding up gradients after the last"
        f" pass takes {found.reduction_s * 1e3:.0f} ms; {found.of_bound:.0%} of the limit of"
        f" {found.bound_s * 1e3:.0f} ms",
    )
