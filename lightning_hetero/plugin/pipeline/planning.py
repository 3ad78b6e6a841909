"""Find the stages of a pipeline from the time that each rank takes for each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_hetero.balance.pipeline.advice import PipelineAdvice, advise_pipeline
from lightning_hetero.balance.pipeline.measured_costs import split_where_possible
from lightning_hetero.balance.pipeline.ordered_stages import OrderedStageProblem
from lightning_hetero.balance.pipeline.orders.choice import PipelineChoice, choose_order, problem_of_way
from lightning_hetero.balance.pipeline.orders.order import Order, known_order
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, most_held_by_default
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.stage_rebalancer import StageProblem
from lightning_hetero.balance.pipeline.stage_solver import StageMemory, solve_stages, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan, WantedSchedule, known_schedule
from lightning_hetero.distributed.collectives import decide_on_rank_zero
from lightning_hetero.distributed.pipeline.chain import LayerCalls
from lightning_hetero.distributed.pipeline.layer_profile import LayerProfile, costs_of, moving_times_s, profile_layers
from lightning_hetero.distributed.pipeline.passes.links import timed_link
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.hardware.memory import meter_of
from lightning_hetero.plugin.common.console import say
from lightning_hetero.plugin.pipeline.step import Example

__all__ = ["PipelineFindings", "budget_bytes", "find_stages", "first_plan", "report_findings"]

_MEMORY_FRACTION = 0.92


@dataclass(frozen=True)
class PipelineFindings:
    """The measurements and what follows from them.

    Attributes:
        plan: The best stages.
        costs: Time that each rank takes for each layer and one micro-batch.
        transfer_s: Seconds that a transfer between two stages takes.
        advice: Predictions for the plan and its alternatives.
        training: Whether the predictions are for training steps.
        problem: The measurements as the watching of the stages needs them.
        choice: How the stages are run, if that was chosen; None for the pipeline schedule that the user has named.
        split_layers: Numbers of the layers whose backward pass can be split.
    """

    plan: StagePlan
    costs: LayerCosts
    transfer_s: float
    advice: PipelineAdvice
    training: bool
    problem: StageProblem
    choice: PipelineChoice | None = None
    split_layers: tuple[int, ...] = ()

    @property
    def watched(self) -> StageProblem:
        """The measurements as the watching of the stages needs them."""
        return self.problem

    @property
    def order(self) -> Order | None:
        """The passes of each rank; None for a known pipeline schedule."""
        return None if self.choice is None else self.choice.order

    def changed(self, plan: StagePlan, factors: Sequence[float], order: Order | None = None) -> PipelineFindings:
        """Return the findings for other stages, on devices that take ``factors`` times as long as when they were timed.

        Args:
            plan: The stages.
            factors: Factor of each rank, rank 0 first.
            order: The passes of each rank; None for a known pipeline schedule.
        """
        known, choice, planned_s = self.problem, self.choice, None
        costs = known.costs.times(factors)
        if order is not None and choice is not None:
            planned_s = known.step_s(plan, factors)
            choice = replace(choice, name=known.way_of(plan), stages=plan, order=order, step_s=planned_s)
        arguments = (known.micro_batches, known.schedule, known.transfer_s, known.samples, known.memory, planned_s)
        return replace(self, plan=plan, costs=costs, choice=choice, advice=advise_pipeline(costs, plan, *arguments))


def find_stages(
    placement: TensorPlacement,
    calls: LayerCalls,
    example: Example,
    schedule: WantedSchedule,
    micro_batches: int,
    device: torch.device,
    budget_bytes: float | None,
    state_per_parameter: float,
) -> PipelineFindings:
    """Return the best stages; every rank must call this at the same point.

    Args:
        placement: Current placement of the layers.
        calls: All layers of the model and how they are called.
        example: A micro-batch to time the layers with.
        schedule: The user's ``schedule``.
        micro_batches: Number of micro-batches that a step may have.
        device: Device on which this rank computes.
        budget_bytes: Memory that this rank may use, in bytes; None if it is unknown.
        state_per_parameter: Number of values that the optimisers keep for each trained value.

    Raises:
        InfeasiblePlanError: The layers do not fit into the ranks' memory; raised on every rank.
    """
    chooses = example.training and schedule in ("auto", "v")
    shares = chooses and schedule == "auto"
    profile = profile_layers(placement, calls, example.call, example.loss_of, device, split=chooses, share=shares)
    # whatever a rank has found out about its layers, all ranks take part
    _, byte_s = timed_link((0, 1), device) if shares and placement.plan.world_size > 1 else (0.0, 0.0)
    numbers = [inf if budget_bytes is None else budget_bytes, byte_s, *profile.to_numbers()]
    decide = _decision(placement.plan.last_ranks[0], example, schedule, micro_batches, state_per_parameter)
    return decide_on_rank_zero(numbers, decide)


def _decision(
    last_rank: int, example: Example, wanted: WantedSchedule, micro_batches: int, state_per_parameter: float
) -> Callable[[list[list[float]]], PipelineFindings]:
    schedule = known_schedule(wanted)

    def decide(rows: list[list[float]]) -> PipelineFindings:
        profiles = [LayerProfile.from_numbers(row[2:]) for row in rows]
        (costs,), split_layers = split_where_possible([costs_of(profiles)])
        if not example.training:
            costs = replace(costs, backward_s=tuple((0.0,) * costs.num_layers for _ in profiles))
        budgets, byte_s = tuple(row[0] for row in rows), rows[0][1]
        memory, kept = None, profiles[0]
        of_layers = zip(kept.parameter_bytes, kept.constant_bytes, strict=True)
        weights = [trained * (2 + state_per_parameter) + constant for trained, constant in of_layers]
        if min(budgets) < inf:
            memory = StageMemory(
                weights_bytes=tuple(weights),
                activations_bytes=tuple(float(n) for n in kept.activations_bytes),
                budgets_bytes=budgets,
                micro_batches=example.micro_batches,
                schedule=schedule,
                received_bytes=tuple(float(example.micro_batches * n) for n in kept.boundary_bytes),
            )
        transfer_s = profiles[0].transfer_s
        choice = problem = None
        if example.training and wanted in ("auto", "v"):
            most = most_held_by_default(len(profiles), memory)
            shared = tuple(i for i in range(costs.num_layers) if all(p.can_be_shared[i] for p in profiles))
            # their gradients are added up, and after the optimiser's step one rank sends the other its parameters
            sharing_s = tuple(2 * n * byte_s for n in kept.parameter_bytes)
            limits = (memory, most, bool(split_layers), shared, sharing_s)
            problem = OrderProblem(costs, micro_batches, last_rank, transfer_s, *limits)
            choice = choose_order(problem, always_v=wanted == "v")
            plan, problem = choice.stages, problem_of_way(problem, choice.name)
        else:
            plan = plan_pipeline(costs, example.micro_batches, schedule, transfer_s, memory, last_rank)
        planned_s = None if choice is None or choice.order is None else choice.step_s
        advice = advise_pipeline(
            costs, plan, example.micro_batches, schedule, transfer_s, example.samples, memory, planned_s
        )
        moving_s = moving_times_s(profiles, state_per_parameter)
        known = (example.micro_batches, example.samples, schedule, transfer_s, memory, moving_s)
        watched = StageProblem(costs, *known)
        if choice is not None and choice.order is not None and problem is not None:
            orders = {plan: choice.order}
            if choice.one_by_one is not None:
                orders[choice.one_by_one] = known_order(choice.one_by_one.ranks, micro_batches, "1f1b")
            watched = OrderedStageProblem(costs, *known, problem, orders, choice.name)
        return PipelineFindings(plan, costs, transfer_s, advice, example.training, watched, choice, split_layers)

    return decide


def first_plan(
    num_layers: int,
    world_size: int,
    splits: str | Sequence[int],
    speeds: Sequence[float] | None,
    found: StagePlan | None,
) -> StagePlan:
    """Return the stages to begin with.

    Args:
        num_layers: Number of layers of the model.
        world_size: Number of ranks.
        splits: The user's ``splits``: a list, or "auto".
        speeds: The user's ``speeds`` of the ranks, or None.
        found: Stages that an earlier run has found; None if there are none.

    Raises:
        ConfigurationError: A split lies beyond the model's last layer.
    """
    uniform = uniform_stages(num_layers, world_size)
    if not isinstance(splits, str):
        if splits and splits[-1] >= num_layers:
            raise ConfigurationError(
                f"`splits` must be below the number of the model's layers, {num_layers}, got {splits}."
            )
        return StagePlan(uniform.ranks, (*splits, num_layers))
    if speeds is not None:
        return solve_stages(LayerCosts.of_speeds([(1.0, 2.0)] * num_layers, speeds))
    fits = found is not None and (found.world_size, found.num_layers) == (world_size, num_layers)
    return found if found is not None and fits else uniform


def budget_bytes(given: int | Sequence[int] | None, rank: int, device: torch.device) -> float | None:
    """Return how much memory a rank may use: the user's limit, or most of what its device has; None if unknown.

    Args:
        given: The user's ``max_memory_bytes``.
        rank: Rank whose memory is asked for.
        device: Device of that rank.
    """
    if given is not None:
        return float(given if isinstance(given, int) else given[rank])
    meter = meter_of(device)
    use = None if meter is None else meter.read()
    return None if use is None else _MEMORY_FRACTION * use.available_bytes


def report_findings(trainer: Trainer, findings: PipelineFindings) -> None:
    """Print the stages that were found and the predictions for them."""
    plan = findings.plan
    for sentence in (
        f"{list(plan.layers_of_ranks)} layers per rank, in the order of ranks {list(plan.ranks)}",
        *([] if findings.choice is None else [findings.choice.reason]),
        *findings.advice.sentences(),
    ):
        say(trainer, f"hetero_pipeline: {sentence}")
    warning = findings.advice.warning()
    if warning is not None:
        rank_zero_warn(f"hetero_pipeline: {warning}")
