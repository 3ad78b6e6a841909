"""Predict a pipeline on a cluster: its stages, its step time, and better alternatives."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from lightning_hetero.balance.pipeline.advice import PipelineAdvice, advise_pipeline
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stage_solver import StageMemory, solve_stages, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StagePlan
from lightning_hetero.command.plan.cluster import MEMORY_FRACTION
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["Layer", "PipelineCluster", "PipelineDevice", "PipelinePrediction", "StagePrediction", "predict_pipeline"]

_MAX_RANKS = 64
# limit of ranks^2 * micro-batches * layers up to which single moves take about a second
_MAX_REFINED = 150_000


@dataclass(frozen=True)
class PipelineDevice:
    """The device of one rank.

    Attributes:
        name: Name to show.
        speed: Speed relative to the device on which the times of the layers were measured.
        memory_bytes: Memory of the device, of which 92 % may be used; None if unknown.
    """

    name: str
    speed: float
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Layer:
    """One layer, on a device of speed 1 and for one micro-batch.

    Attributes:
        forward_s: Seconds of the forward pass.
        backward_s: Seconds of the backward pass.
        parameter_bytes: Size of the parameters.
        activation_bytes: Size of the activations that are kept for the backward pass.
    """

    forward_s: float
    backward_s: float
    parameter_bytes: float = 0.0
    activation_bytes: float = 0.0


@dataclass(frozen=True)
class PipelineCluster:
    """The devices and layers of a pipeline.

    Attributes:
        devices: Device of each rank; rank 0 has the last stage.
        layers: Layers in the order in which they are called.
        micro_batches: Number of micro-batches per step.
        schedule: Pipeline schedule.
        transfer_s: Seconds that a transfer between two stages takes.
        batch_size: Number of samples per step, which limits the number of micro-batches; None if unknown.
        optimizer_states: Numbers that the optimiser keeps for each parameter: 2 for Adam, 0 for plain SGD.

    Raises:
        ConfigurationError: There are more devices than can be planned for.
    """

    devices: tuple[PipelineDevice, ...]
    layers: tuple[Layer, ...]
    micro_batches: int = 4
    schedule: Schedule = "1f1b"
    transfer_s: float = 0.0
    batch_size: int | None = None
    optimizer_states: float = 2.0

    def __post_init__(self) -> None:
        if len(self.devices) > _MAX_RANKS:
            raise ConfigurationError(
                f"A pipeline must have at most {_MAX_RANKS} devices to be predicted, got {len(self.devices)}."
            )

    @property
    def costs(self) -> LayerCosts:
        """Time of every layer on every rank."""
        return LayerCosts.of_speeds(
            [(layer.forward_s, layer.backward_s) for layer in self.layers], [device.speed for device in self.devices]
        )

    @property
    def is_refined(self) -> bool:
        """Whether stages are improved in a simulation, which takes long for many ranks and layers."""
        return len(self.devices) ** 2 * self.micro_batches * len(self.layers) <= _MAX_REFINED

    @property
    def memory(self) -> StageMemory | None:
        """Memory needs of the layers and budgets of the ranks; None if no device's memory is known."""
        sizes = [device.memory_bytes for device in self.devices]
        if all(size is None for size in sizes):
            return None
        copies = 2 + self.optimizer_states  # the parameter, its gradient, and the state of the optimiser
        return StageMemory(
            weights_bytes=tuple(copies * layer.parameter_bytes for layer in self.layers),
            activations_bytes=tuple(layer.activation_bytes for layer in self.layers),
            budgets_bytes=tuple(inf if size is None else MEMORY_FRACTION * size for size in sizes),
            micro_batches=self.micro_batches,
            schedule=self.schedule,
        )


@dataclass(frozen=True)
class StagePrediction:
    """The prediction for one stage.

    Attributes:
        rank: Rank that computes the stage.
        device: Device of that rank.
        first_layer: Index of the first layer, counted from 0.
        num_layers: Number of layers, at least 1.
        busy_s: Seconds per step in which the rank computes.
        needed_bytes: Largest memory that the stage needs; None if no device's memory is known.
    """

    rank: int
    device: PipelineDevice
    first_layer: int
    num_layers: int
    busy_s: float
    needed_bytes: float | None


@dataclass(frozen=True)
class PipelinePrediction:
    """The prediction for a pipeline.

    Attributes:
        stages: Predictions for the stages, the first stage first.
        advice: Step times, and better alternatives.
        uniform_fits: Whether equal numbers of layers fit into memory; None if no device's memory is known.
        is_refined: Whether single moves were tried in a simulation, as ``hetero_pipeline`` does. Otherwise the plan is
            the one whose slowest stage is fastest, or the uniform one if that is better.
    """

    stages: tuple[StagePrediction, ...]
    advice: PipelineAdvice
    uniform_fits: bool | None
    is_refined: bool


def predict_pipeline(cluster: PipelineCluster) -> PipelinePrediction:
    """Predict a step of ``hetero_pipeline``.

    Raises:
        ConfigurationError: There are fewer layers than devices.
        InfeasiblePlanError: The layers do not fit into the memory of the devices.

    Example:
        >>> devices = (PipelineDevice("fast", 2.0), PipelineDevice("slow", 1.0))
        >>> prediction = predict_pipeline(PipelineCluster(devices, (Layer(0.001, 0.002),) * 12, micro_batches=8))
        >>> [(stage.device.name, stage.num_layers) for stage in prediction.stages]
        [('slow', 4), ('fast', 8)]
    """
    if len(cluster.devices) > len(cluster.layers):
        raise ConfigurationError(
            f"A pipeline must have at least one layer per device, got {len(cluster.devices)} devices and"
            f" {len(cluster.layers)} layers. Use fewer devices, or divide the model into more layers."
        )
    costs, memory = cluster.costs, cluster.memory
    size = costs.world_size
    is_refined = cluster.is_refined
    uniform = uniform_stages(costs.num_layers, size)
    uniform_fits = None if memory is None else memory.allows(uniform)
    if is_refined:
        plan = plan_pipeline(costs, cluster.micro_batches, cluster.schedule, cluster.transfer_s, memory)
    else:
        plan = _better(cluster, costs, solve_stages(costs, memory), uniform if uniform_fits is not False else None)
    times = costs.of_stages(plan)
    needed = [None] * size if memory is None else memory.needed_bytes(plan)
    stages = tuple(
        StagePrediction(
            rank=rank,
            device=cluster.devices[rank],
            first_layer=plan.layers(stage).start,
            num_layers=len(plan.layers(stage)),
            busy_s=cluster.micro_batches * (times.forward_s[stage] + times.backward_s[stage]),
            needed_bytes=needed[stage],
        )
        for stage, rank in enumerate(plan.ranks)
    )
    advice = advise_pipeline(
        costs, plan, cluster.micro_batches, cluster.schedule, cluster.transfer_s, cluster.batch_size, memory
    )
    return PipelinePrediction(stages, advice, uniform_fits, is_refined)


def _better(cluster: PipelineCluster, costs: LayerCosts, one: StagePlan, other: StagePlan | None) -> StagePlan:
    def step_s(plan: StagePlan) -> float:
        times = costs.of_stages(plan)
        return simulate_pipeline(times, cluster.micro_batches, cluster.schedule, cluster.transfer_s).step_s

    return min((plan for plan in (one, other) if plan is not None), key=step_s)
