"""Predict memory and step time of a training with shards on a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, solve_batch
from lightning_hetero.balance.shards.memory import ModelMemory, RankMemory, weights_by_memory
from lightning_hetero.balance.shards.step import ShardedStep
from lightning_hetero.command.plan.cluster import MEMORY_FRACTION, Cluster, DeviceKind, SampleMemory

__all__ = ["KindShare", "ShardedCluster", "ShardedPrediction", "predict_shards"]

# a gathered unit and the one ahead; gradients of a unit, and the row in which they are reduced
_WHOLE_UNITS = 4


@dataclass(frozen=True)
class ShardedCluster:
    """A data-parallel training whose model is divided.

    Attributes:
        cluster: Devices, batch and link; every device has a known memory.
        parameter_bytes: Memory of all parameters.
        units: Number of equal units.
        optimizer_states: How many numbers the optimiser keeps per parameter.
    """

    cluster: Cluster
    parameter_bytes: float
    units: int
    optimizer_states: float = 2.0

    @property
    def memory(self) -> ModelMemory:
        """The memory of the model."""
        whole = _WHOLE_UNITS * self.parameter_bytes / self.units
        return ModelMemory((2 + self.optimizer_states) * self.parameter_bytes, whole)

    @property
    def bytes_per_sample(self) -> float:
        """The memory of the activations of a sample; 0 if it is unknown."""
        return self.cluster.memory.bytes_per_sample if self.cluster.memory is not None else 0.0

    @property
    def fixed_bytes(self) -> float:
        """The memory that each device needs besides."""
        return self.cluster.memory.fixed_bytes if self.cluster.memory is not None else 0.0


@dataclass(frozen=True)
class KindShare:
    """What each device of a kind gets.

    Attributes:
        kind: Kind of device.
        samples: Samples of the device with the most.
        weight: Part of the model that it holds.
        needed_bytes: Memory that it needs.
    """

    kind: DeviceKind
    samples: int
    weight: float
    needed_bytes: float


@dataclass(frozen=True)
class ShardedPrediction:
    """The prediction.

    Attributes:
        kinds: One entry per kind, in the order of the cluster.
        step: The step.
        even: The step with equal batches and equal shards; None if they do not fit.
        even_does_not_fit: Reason why they do not fit; None if they do.
    """

    kinds: tuple[KindShare, ...]
    step: ShardedStep
    even: ShardedStep | None
    even_does_not_fit: str | None

    @property
    def speed_up(self) -> float | None:
        """Samples per second divided by those with equal batches and shards; None if these do not fit."""
        return None if self.even is None else self.even.step_s / self.step.step_s


def predict_shards(sharded: ShardedCluster) -> ShardedPrediction:
    """Predict a step of ``hetero_fsdp`` on all devices.

    Samples are divided by speed, as far as activations fit beside the units that are whole. The rest of each device's
    memory decides how much of the model it holds.

    Args:
        sharded: Devices and training to predict.

    Raises:
        InfeasiblePlanError: It does not fit; the message says by how much.
    """
    memory, cluster = sharded.memory, sharded.cluster
    besides = memory.gathered_bytes + sharded.fixed_bytes
    limited = cluster
    if sharded.bytes_per_sample:
        limited = replace(cluster, memory=SampleMemory(sharded.bytes_per_sample, besides))
    counts = tuple(kind.count for kind in cluster.kinds)
    times = limited.step_times(counts)
    plan = solve_batch(times, cluster.global_batch_size, limited.limits(counts), min_samples=1)
    free = [MEMORY_FRACTION * (kind.memory_bytes or 0.0) for kind in cluster.kinds for _ in range(kind.count)]
    ranks = [
        RankMemory(have - sharded.fixed_bytes, sharded.bytes_per_sample * samples)
        for have, samples in zip(free, plan.samples, strict=True)
    ]
    left = weights_by_memory(ranks, memory)
    weights = [one / sum(left) for one in left]
    kinds = []
    for kind, (begin, end) in zip(cluster.kinds, pairwise(accumulate(counts, initial=0)), strict=True):
        first = max(range(begin, end), key=lambda rank: plan.samples[rank])
        samples, weight = plan.samples[first], weights[first]
        needed = weight * memory.sharded_bytes + besides + sharded.bytes_per_sample * samples
        kinds.append(KindShare(kind, samples, weight, needed))
    even, reason = _even(sharded)
    return ShardedPrediction(tuple(kinds), _step(sharded, predicted_step_s(times, plan), min(weights)), even, reason)


def _step(sharded: ShardedCluster, own_s: float, smallest: float) -> ShardedStep:
    """Return the step if the slowest device needs ``own_s``, and the one with the smallest shard receives the rest."""
    link = sharded.cluster.all_reduce
    size, ranks = sharded.parameter_bytes / sharded.units, sharded.cluster.world_size
    transfer_s = 0.0 if link.bits_per_s is None else 8 * size * (1 - smallest) / link.bits_per_s
    transfer_s += (ranks - 1) * link.latency_s
    return ShardedStep(own_s, transfer_s, transfer_s, sharded.units)


def _even(sharded: ShardedCluster) -> tuple[ShardedStep | None, str | None]:
    cluster, memory = sharded.cluster, sharded.memory
    samples = -(-cluster.global_batch_size // cluster.world_size)
    needed = memory.sharded_bytes / cluster.world_size + memory.gathered_bytes + sharded.fixed_bytes
    needed += sharded.bytes_per_sample * samples
    for kind in cluster.kinds:
        have = MEMORY_FRACTION * (kind.memory_bytes or 0.0)
        if needed > have:
            return None, f"{kind.name} would need {needed / 1e9:.3g} GB and may use {have / 1e9:.3g} GB"
        if kind.max_batch_size is not None and samples > kind.max_batch_size:
            return None, f"{kind.name} can hold {kind.max_batch_size} samples, but an equal share is {samples}"
    own_s = max(kind.step_time.seconds(samples) for kind in cluster.kinds)
    return _step(sharded, own_s, 1 / cluster.world_size), None
