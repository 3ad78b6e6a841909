"""Predict each strategy on the same devices with the same global batch, and choose the simplest of the fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from lightning_hetero.balance.pipeline.replicas.problem import Link, ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.solver import solve_replicas
from lightning_hetero.balance.pipeline.stages import LayerCosts
from lightning_hetero.balance.types import StepTime
from lightning_hetero.command.plan.auto.model import Model, ModelLayer
from lightning_hetero.command.plan.cluster import MEMORY_FRACTION, Cluster, DeviceKind, SampleMemory
from lightning_hetero.command.plan.cluster_plan import plan_cluster
from lightning_hetero.command.plan.communication import AllReduce, bucket_bytes
from lightning_hetero.command.plan.pipeline.pipeline_cluster import (
    Layer,
    PipelineCluster,
    PipelineDevice,
    predict_pipeline,
)
from lightning_hetero.command.plan.pipeline.planned_order import predict_order
from lightning_hetero.command.plan.shards.prediction import ShardedCluster, predict_shards
from lightning_hetero.exceptions import HeteroError, InfeasiblePlanError

__all__ = ["AutoCluster", "AutoDevice", "AutoPrediction", "Candidate", "predict_all"]

_MAX_REPLICA_RANKS = 64
_NEARLY = 1.02  # a simpler strategy is taken that needs no more than this times the shortest step


@dataclass(frozen=True)
class AutoDevice:
    """Several devices of equal speed, memory and price.

    Attributes:
        name: Name to show.
        count: Number of devices.
        speed: Speed relative to the device on which the layers were timed.
        memory_bytes: Memory of each device, of which 92 % may be used; None if unknown.
        price_per_hour: Price of each device, in any currency; None if unknown.
    """

    name: str
    count: int
    speed: float
    memory_bytes: float | None = None
    price_per_hour: float | None = None


@dataclass(frozen=True)
class AutoCluster:
    """The devices and the training for which a strategy is wanted.

    Attributes:
        devices: Kinds of devices, in the order of ranks.
        model: The model.
        global_batch_size: Number of samples of all devices in a step.
        micro_batches: Number of micro-batches of a pipeline's step.
        bits_per_s: Bandwidth of the slowest link; None if transfers take no time.
        latency_s: Latency of one message.
        devices_per_node: Number of devices of each node, in the order of ranks; None if all are in one. Only replicas
            are predicted with faster links within nodes.
        node_bits_per_s: Bandwidth between devices of a node; None if it is no different.
    """

    devices: tuple[AutoDevice, ...]
    model: Model
    global_batch_size: int
    micro_batches: int = 8
    bits_per_s: float | None = None
    latency_s: float = 0.0
    devices_per_node: int | None = None
    node_bits_per_s: float | None = None

    @property
    def world_size(self) -> int:
        """The number of devices."""
        return sum(device.count for device in self.devices)

    @property
    def ranks(self) -> tuple[AutoDevice, ...]:
        """The device of each rank."""
        return tuple(device for device in self.devices for _ in range(device.count))

    @property
    def price_per_hour(self) -> float | None:
        """The price of all devices together; None if it is not known of each."""
        prices = [device.price_per_hour for device in self.devices]
        if any(price is None for price in prices):
            return None
        return sum((device.price_per_hour or 0.0) * device.count for device in self.devices)

    @property
    def of_whole_models(self) -> Cluster:
        """The training in which every device holds the whole model, whatever its memory."""
        time = self.model.step_time
        kinds = tuple(
            DeviceKind(
                device.name,
                device.count,
                StepTime(time.overhead_s / device.speed, time.seconds_per_sample / device.speed),
                memory_bytes=device.memory_bytes,
                price_per_hour=device.price_per_hour,
            )
            for device in self.devices
        )
        reduced = AllReduce(bucket_bytes(self.model.parameter_bytes), self.bits_per_s, self.latency_s)
        return Cluster(kinds, self.global_batch_size, reduced)

    @property
    def of_stages(self) -> PipelineCluster:
        """The training in which every device holds some layers."""
        samples, model = self.global_batch_size / self.micro_batches, self.model
        largest = max((layer.output_bytes for layer in model.layers[:-1]), default=0.0)
        transfer_s = 0.0 if self.bits_per_s is None else 8 * samples * largest / self.bits_per_s
        return PipelineCluster(
            tuple(PipelineDevice(device.name, device.speed, device.memory_bytes) for device in self.ranks),
            tuple(_of_micro_batch(layer, samples) for layer in model.layers),
            self.micro_batches,
            transfer_s=transfer_s + self.latency_s,
            batch_size=self.global_batch_size,
            optimizer_states=model.optimizer_states,
        )

    @property
    def of_replicas(self) -> ReplicaProblem:
        """The training by several pipelines side by side, with memory for gradients that are added up."""
        layers, ranks = self.model.layers, self.ranks
        memory = replace(self, micro_batches=self.global_batch_size).of_stages.memory  # of one sample
        if memory is not None:
            added_up = (layer.parameter_bytes for layer in layers)
            weights = tuple(map(sum, zip(memory.weights_bytes, added_up, strict=True)))
            memory = replace(memory, weights_bytes=weights)
        speeds = [device.speed for device in ranks]
        link = Link(self.latency_s, 0.0 if self.bits_per_s is None else 8 / self.bits_per_s)
        return ReplicaProblem(
            LayerCosts.of_speeds([(layer.forward_s, layer.backward_s) for layer in layers], speeds),
            self.global_batch_size,
            self.micro_batches,
            overheads=LayerCosts.of_speeds(
                [(layer.forward_overhead_s, layer.backward_overhead_s) for layer in layers], speeds
            ),
            parameter_bytes=tuple(layer.parameter_bytes for layer in layers),
            output_bytes=tuple(layer.output_bytes for layer in layers),
            memory=memory,
            within=link if self.node_bits_per_s is None else Link(self.latency_s, 8 / self.node_bits_per_s),
            between=link,
            nodes=() if self.devices_per_node is None else tuple(r // self.devices_per_node for r in range(len(ranks))),
        )


def _of_micro_batch(layer: ModelLayer, samples: float) -> Layer:
    return Layer(
        layer.forward_overhead_s + samples * layer.forward_s,
        layer.backward_overhead_s + samples * layer.backward_s,
        layer.parameter_bytes,
        samples * layer.activation_bytes,
    )


@dataclass(frozen=True)
class Candidate:
    """A strategy and the prediction for it.

    Attributes:
        strategy: Name of the strategy; "replicas" for several pipelines of ``hetero_pipeline``.
        argument: What to pass to ``Trainer`` as ``strategy``, as Python code; None if it cannot train this.
        step_s: Seconds per step; None if the strategy cannot train this.
        needed_bytes: Largest memory that a device of each kind needs, in the order of the kinds; None if no device's
            memory is known.
        why_not: Reason why the strategy cannot train this; None if it can.
    """

    strategy: str
    argument: str | None = None
    step_s: float | None = None
    needed_bytes: tuple[float, ...] | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class AutoPrediction:
    """The predictions for all strategies.

    Attributes:
        candidates: One entry per strategy, the simplest first; for replicas only if they are faster than one pipeline.
        chosen: The strategy to take; None if none can train this.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None


def predict_all(cluster: AutoCluster) -> AutoPrediction:
    """Predict every strategy, and choose the simplest of those that are within 2 % of the fastest.

    Example:
        >>> devices = AutoDevice("fast", 1, 2.0), AutoDevice("slow", 1, 1.0)
        >>> layers = (ModelLayer(0.001, 0.002, parameter_bytes=4e6),) * 6
        >>> prediction = predict_all(AutoCluster(devices, Model(layers), global_batch_size=96))
        >>> prediction.chosen.strategy, round(prediction.chosen.step_s, 3)
        ('hetero_ddp', 0.576)
    """
    candidates = tuple(_tried(name, predict, cluster) for name, predict in _STRATEGIES)
    alone_s = next((one.step_s for one in candidates if one.strategy == "hetero_pipeline" and one.step_s), inf)
    replicas = _replicas(cluster, alone_s)
    candidates += () if replicas is None else (replicas,)
    times = [one.step_s for one in candidates if one.step_s is not None]
    nearly = _NEARLY * min(times, default=0.0)
    chosen = next((one for one in candidates if one.step_s is not None and one.step_s <= nearly), None)
    return AutoPrediction(candidates, chosen)


@dataclass(frozen=True)
class _Found:
    step_s: float
    needed_bytes: tuple[float, ...] | None
    argument: str


def _tried(name: str, predict: Callable[[AutoCluster], _Found], cluster: AutoCluster) -> Candidate:
    try:
        found = predict(cluster)
    except HeteroError as error:
        return Candidate(name, why_not=str(error))
    return Candidate(name, found.argument, found.step_s, found.needed_bytes)


def _ddp(cluster: AutoCluster) -> _Found:
    share = -(-cluster.global_batch_size // cluster.world_size)
    needed = _whole(cluster, [share] * len(cluster.devices))
    for device, needed_bytes in zip(cluster.devices, needed or (), strict=False):
        if device.memory_bytes is not None and needed_bytes > MEMORY_FRACTION * device.memory_bytes:
            raise InfeasiblePlanError(
                f"{device.name} would need {_gb(needed_bytes)} for {share} samples, and may use"
                f" {_gb(MEMORY_FRACTION * device.memory_bytes)}"
            )
    whole = cluster.of_whole_models
    own_s = max(kind.step_time.seconds(share) for kind in whole.kinds)
    return _Found(whole.all_reduce.step_s(own_s, cluster.world_size), needed, '"ddp"')


def _hetero_ddp(cluster: AutoCluster) -> _Found:
    whole, memory = cluster.of_whole_models, cluster.model.memory
    most = [memory.most_samples(d.memory_bytes) for d in cluster.devices if d.memory_bytes is not None]
    if min(most, default=1) < 1:
        device = min(cluster.devices, key=lambda one: one.memory_bytes or float("inf"))
        raise InfeasiblePlanError(
            f"every device holds the whole model, for which {device.name} would need"
            f" {_gb(memory.fixed_bytes + memory.bytes_per_sample)} with one sample, and may use"
            f" {_gb(MEMORY_FRACTION * (device.memory_bytes or 0.0))}"
        )
    try:
        plan = plan_cluster(replace(whole, memory=memory))
    except InfeasiblePlanError:
        if cluster.global_batch_size < cluster.world_size:
            raise
        return _in_micro_batches(cluster, whole, min(most))
    return _Found(plan.whole.step_s, _whole(cluster, [kind.max_samples for kind in plan.kinds]), '"hetero_ddp"')


def _in_micro_batches(cluster: AutoCluster, whole: Cluster, size: int) -> _Found:
    """Return the prediction for mini-batches that do not fit at once; each part has the overhead of a step."""
    kinds = tuple(
        replace(
            kind,
            step_time=StepTime(0.0, kind.step_time.seconds_per_sample + kind.step_time.overhead_s / size),
        )
        for kind in whole.kinds
    )
    plan = plan_cluster(replace(whole, kinds=kinds))
    samples = [min(kind.max_samples, size) for kind in plan.kinds]
    return _Found(plan.whole.step_s, _whole(cluster, samples), f"HeteroDDPStrategy(micro_batch_size={size})")


def _whole(cluster: AutoCluster, samples: list[int]) -> tuple[float, ...] | None:
    if all(device.memory_bytes is None for device in cluster.devices):
        return None
    memory = cluster.model.memory
    return tuple(memory.fixed_bytes + n * memory.bytes_per_sample for n in samples)


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.3g} GB"


def _hetero_fsdp(cluster: AutoCluster) -> _Found:
    unknown = [device.name for device in cluster.devices if device.memory_bytes is None]
    if unknown:
        raise InfeasiblePlanError(f"shards are made by memory, and that of {unknown[0]} is not known")
    if cluster.world_size == 1:
        raise InfeasiblePlanError("there is only one device")
    whole, model = cluster.of_whole_models, cluster.model
    units = max(sum(layer.parameter_bytes > 0 for layer in model.layers), 1)
    constant = replace(model.memory, fixed_bytes=model.constant_bytes)
    shards = ShardedCluster(replace(whole, memory=constant), model.parameter_bytes, units, model.optimizer_states)
    besides = SampleMemory(constant.bytes_per_sample, model.constant_bytes + shards.memory.gathered_bytes)
    held = sum(d.count * besides.most_samples(d.memory_bytes) for d in cluster.devices if d.memory_bytes is not None)
    if held < cluster.global_batch_size:
        raise InfeasiblePlanError(
            f"beside the units that are whole at a time, the devices hold the activations of {held} samples"
        )
    found = predict_shards(shards)
    return _Found(found.step.step_s, tuple(kind.needed_bytes for kind in found.kinds), '"hetero_fsdp"')


def _hetero_pipeline(cluster: AutoCluster) -> _Found:
    if cluster.world_size == 1:
        raise InfeasiblePlanError("there is only one device")
    found, planned = predict_pipeline(cluster.of_stages), predict_order(cluster.of_stages)
    step_s, by_rank = found.advice.step_s, {stage.rank: stage.needed_bytes for stage in found.stages}
    if planned is not None:
        step_s, by_rank = planned.step_s, dict(enumerate(planned.needed_bytes or [None] * cluster.world_size))
    needed, first = [], 0
    for device in cluster.devices:
        of_kind = [by_rank[rank] or 0.0 for rank in range(first, first + device.count)]
        needed.append(max(of_kind))
        first += device.count
    known = any(value is not None for value in by_rank.values())
    argument = f"HeteroPipelineStrategy(num_microbatches={cluster.micro_batches})"
    return _Found(step_s, tuple(needed) if known else None, argument)


def _replicas(cluster: AutoCluster, alone_s: float) -> Candidate | None:
    """Return the best pipelines side by side; None if one pipeline of all devices is as fast, or a device by itself."""
    if not 1 < cluster.world_size <= _MAX_REPLICA_RANKS:
        return None
    problem = cluster.of_replicas
    try:
        solution = solve_replicas(problem)
    except HeteroError:
        return None
    replicas = solution.plan.replicas
    if not 1 < len(replicas) < cluster.world_size or solution.step_s >= alone_s:
        return None  # a replica on each device is what hetero_ddp does
    needed = [0.0] * len(cluster.devices)
    kinds = [kind for kind, device in enumerate(cluster.devices) for _ in range(device.count)]
    for replica, samples in zip(replicas, solution.samples, strict=True):
        memory = problem.memory_of(replica.ranks, samples)
        of_stages = () if memory is None else memory.needed_bytes(replica.stages)
        for own, needed_bytes in zip(replica.stages.ranks, of_stages, strict=False):
            kind = kinds[replica.ranks[own]]
            needed[kind] = max(needed[kind], needed_bytes)
    groups = [[replica.last_rank, *sorted({*replica.ranks} - {replica.last_rank})] for replica in replicas]
    argument = f"HeteroPipelineStrategy(replicas={groups}, num_microbatches={cluster.micro_batches})"
    return Candidate("replicas", argument, solution.step_s, None if problem.memory is None else tuple(needed))


_STRATEGIES: tuple[tuple[str, Callable[[AutoCluster], _Found]], ...] = (
    ("ddp", _ddp),
    ("hetero_ddp", _hetero_ddp),
    ("hetero_fsdp", _hetero_fsdp),
    ("hetero_pipeline", _hetero_pipeline),
)
