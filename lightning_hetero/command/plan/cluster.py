"""Devices that nobody has started yet: what a prediction for data-parallel training needs to know of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_hetero.balance.types import BatchLimits, StepTime
from lightning_hetero.command.plan.communication import AllReduce
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

__all__ = ["MEMORY_FRACTION", "Cluster", "DeviceKind", "SampleMemory"]

# what LoadBalancer leaves free by default
MEMORY_FRACTION = 0.92


@dataclass(frozen=True)
class SampleMemory:
    """What a pass holds: ``fixed_bytes + bytes_per_sample * n``.

    Attributes:
        bytes_per_sample: positive.
        fixed_bytes: parameters, gradients, the state of the optimiser.
    """

    bytes_per_sample: float
    fixed_bytes: float = 0.0

    def most_samples(self, memory_bytes: float) -> int:
        """Return how many samples fit into 92 % of ``memory_bytes``, as much as ``LoadBalancer`` uses."""
        return max(math.floor((MEMORY_FRACTION * memory_bytes - self.fixed_bytes) / self.bytes_per_sample), 0)


@dataclass(frozen=True)
class DeviceKind:
    """Devices of equal speed, memory and price.

    Attributes:
        name: for people.
        count: how many, at least 1.
        step_time: of each.
        max_batch_size: most samples of each; None for no limit.
        memory_bytes: of each; None where unknown.
        price_per_hour: of each, in any currency; None where unknown.
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
    """The devices of a training and what they exchange.

    Attributes:
        kinds: at least one.
        global_batch_size: samples of all devices in a step.
        all_reduce: of the gradients.
        batch_multiple: every device's samples are a multiple of this, but for one device that takes the remainder.
        memory: what a pass holds; None where unknown.

    Raises:
        ConfigurationError: there is no device, or only some have a price.
        InfeasiblePlanError: a kind cannot hold a single multiple.
    """

    kinds: tuple[DeviceKind, ...]
    global_batch_size: int
    all_reduce: AllReduce = field(default_factory=AllReduce)
    batch_multiple: int = 1
    memory: SampleMemory | None = None

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ConfigurationError("`kinds` must hold at least one kind of devices, got none.")
        unpriced = [kind.name for kind in self.kinds if kind.price_per_hour is None]
        if unpriced and len(unpriced) < len(self.kinds):
            raise ConfigurationError(
                f"`price_per_hour` must be given for all devices or for none, got none for {unpriced[0]}. A device that"
                f" costs nothing has the price 0."
            )
        for kind in self.kinds:
            most = kind.most_samples(self.memory)
            if most is not None and most < self.batch_multiple:
                raise InfeasiblePlanError(
                    f"{kind.name} must hold at least {self.batch_multiple} samples (`batch_multiple`), but its memory"
                    f" or `max_batch_size` holds {most}. Leave it out, or use smaller samples."
                )

    @property
    def world_size(self) -> int:
        """The number of devices."""
        return sum(kind.count for kind in self.kinds)

    @property
    def most_samples(self) -> tuple[int, ...]:
        """The most samples that a device of each kind may get, at most the global batch."""
        limits = (kind.most_samples(self.memory) for kind in self.kinds)
        return tuple(self.global_batch_size if n is None else min(n, self.global_batch_size) for n in limits)

    @property
    def is_priced(self) -> bool:
        """Whether prices are known."""
        return self.kinds[0].price_per_hour is not None

    def step_times(self, counts: tuple[int, ...]) -> list[StepTime]:
        """Return the step time of each rank if ``counts`` devices of each kind are used."""
        return [kind.step_time for kind, count in zip(self.kinds, counts, strict=True) for _ in range(count)]

    def limits(self, counts: tuple[int, ...]) -> BatchLimits:
        """Return what a plan for ``counts`` devices of each kind has to respect."""
        if all(kind.most_samples(self.memory) is None for kind in self.kinds):
            return BatchLimits(None, self.batch_multiple)
        caps = (most for most, count in zip(self.most_samples, counts, strict=True) for _ in range(count))
        return BatchLimits(tuple(caps), self.batch_multiple)

    def price_per_hour(self, counts: tuple[int, ...]) -> float:
        """Return what ``counts`` devices of each kind cost in an hour; 0 without prices."""
        return sum((kind.price_per_hour or 0.0) * count for kind, count in zip(self.kinds, counts, strict=True))
