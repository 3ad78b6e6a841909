"""Describe the devices and the data-parallel training for which ``plan`` makes a prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_hetero.balance.types import BatchLimits, StepTime
from lightning_hetero.command.plan.communication import AllReduce
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

__all__ = ["MEMORY_FRACTION", "Cluster", "DeviceKind", "SampleMemory"]

# the fraction of a device's memory that LoadBalancer uses by default
MEMORY_FRACTION = 0.92


@dataclass(frozen=True)
class SampleMemory:
    """The memory that a device needs for n samples: ``fixed_bytes + bytes_per_sample * n``.

    Attributes:
        bytes_per_sample: Memory per sample; positive.
        fixed_bytes: Memory for parameters, gradients and the state of the optimiser.
    """

    bytes_per_sample: float
    fixed_bytes: float = 0.0

    def most_samples(self, memory_bytes: float) -> int:
        """Return how many samples fit into 92 % of ``memory_bytes``, the fraction that ``LoadBalancer`` uses."""
        return max(math.floor((MEMORY_FRACTION * memory_bytes - self.fixed_bytes) / self.bytes_per_sample), 0)


@dataclass(frozen=True)
class DeviceKind:
    """Several devices of equal speed, memory and price.

    Attributes:
        name: Name to show.
        count: Number of devices, at least 1.
        step_time: Step time of each device.
        max_batch_size: Maximum mini-batch size of each device; None for no limit.
        memory_bytes: Memory of each device; None if unknown.
        price_per_hour: Price of each device, in any currency; None if unknown.
    """

    name: str
    count: int
    step_time: StepTime
    max_batch_size: int | None = None
    memory_bytes: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigurationError(f"`count` must be at least 1, got {self.count} of {self.name}.")

    def most_samples(self, memory: SampleMemory | None) -> int | None:
        """Return the most samples that a device may get; None for no limit."""
        limits = [self.max_batch_size]
        if memory is not None and self.memory_bytes is not None:
            limits.append(memory.most_samples(self.memory_bytes))
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class Cluster:
    """The devices of a data-parallel training, its batch and its communication.

    Attributes:
        kinds: Kinds of devices, at least one.
        global_batch_size: Number of samples of all devices in a step.
        all_reduce: All-reduce of the gradients.
        batch_multiple: Number that every device's samples are a multiple of, except on one device, which takes the
            remainder.
        memory: Memory that a device needs for its samples; None if unknown.

    Raises:
        ConfigurationError: There is no device, or only some devices have a price.
        InfeasiblePlanError: A kind of device cannot hold a single multiple.
    """

    kinds: tuple[DeviceKind, ...]
    global_batch_size: int
    all_reduce: AllReduce = field(default_factory=AllReduce)
    batch_multiple: int = 1
    memory: SampleMemory | None = None

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ConfigurationError("`kinds` must contain at least one kind of device, got none.")
        unpriced = [kind.name for kind in self.kinds if kind.price_per_hour is None]
        if unpriced and len(unpriced) < len(self.kinds):
            raise ConfigurationError(
                f"`price_per_hour` must be given for all devices or for none, got none for {unpriced[0]}. Use 0 for a"
                f" device that costs nothing."
            )
        for kind in self.kinds:
            most = kind.most_samples(self.memory)
            if most is not None and most < self.batch_multiple:
                raise InfeasiblePlanError(
                    f"{kind.name} must hold at least `batch_multiple` samples ({self.batch_multiple}), but its memory"
                    f" or `max_batch_size` allows {most}. Leave the device out, or use smaller samples."
                )

    @property
    def world_size(self) -> int:
        """The number of devices."""
        return sum(kind.count for kind in self.kinds)

    @property
    def most_samples(self) -> tuple[int, ...]:
        """Most samples that a device of each kind may get, at most the global batch."""
        limits = (kind.most_samples(self.memory) for kind in self.kinds)
        return tuple(self.global_batch_size if n is None else min(n, self.global_batch_size) for n in limits)

    @property
    def is_priced(self) -> bool:
        """Whether the devices have prices."""
        return self.kinds[0].price_per_hour is not None

    def step_times(self, counts: tuple[int, ...]) -> list[StepTime]:
        """Return the step time of each rank if ``counts`` devices of each kind are used."""
        return [kind.step_time for kind, count in zip(self.kinds, counts, strict=True) for _ in range(count)]

    def limits(self, counts: tuple[int, ...]) -> BatchLimits:
        """Return the limits that a plan for ``counts`` devices of each kind must respect."""
        if all(kind.most_samples(self.memory) is None for kind in self.kinds):
            return BatchLimits(None, self.batch_multiple)
        caps = (most for most, count in zip(self.most_samples, counts, strict=True) for _ in range(count))
        return BatchLimits(tuple(caps), self.batch_multiple)

    def price_per_hour(self, counts: tuple[int, ...]) -> float:
        """Return the price per hour of ``counts`` devices of each kind; 0 without prices."""
        return sum((kind.price_per_hour or 0.0) * count for kind, count in zip(self.kinds, counts, strict=True))
