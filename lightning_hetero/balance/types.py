"""The values that layers exchange: frozen dataclasses of plain numbers and strings, which JSON can hold.

A plan travels from the solver through a broadcast into a sampler, a table and a checkpoint without conversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import pairwise
from typing import Any

from lightning_hetero.balance.checked import as_float, as_ints, as_list, as_mapping, entry
from lightning_hetero.exceptions import ConfigurationError

__all__ = [
    "BatchLimits",
    "BatchPlan",
    "BatchSlice",
    "DeviceProfile",
    "MemoryReading",
    "PlanSchedule",
    "StepTime",
    "StepTiming",
    "WindowTiming",
    "weight_in_mean",
]


@dataclass(frozen=True)
class DeviceProfile:
    """The device that a rank runs on.

    Attributes:
        host: Name of the machine.
        device: Name of the device in torch, for example ``"cuda:0"`` or ``"cpu"``.
        name: Name of the model, for example ``"Tesla V100-SXM2-16GB"``.
        nominal_speed: Speed according to the data sheet, comparable between devices for which it is known; None if
            unknown.
    """

    host: str
    device: str
    name: str
    nominal_speed: float | None = None

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device works asynchronously to its host."""
        return self.device != "cpu"

    def to_dict(self) -> dict[str, str | float | None]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class StepTiming:
    """One measured step of one rank.

    Attributes:
        samples: Size of the rank's mini-batch.
        own_s: Own time of the rank in seconds, without waiting for other ranks.
        waiting_s: Remaining seconds of the step, in which the rank may have waited for others.
    """

    samples: int
    own_s: float
    waiting_s: float = 0.0


@dataclass(frozen=True)
class WindowTiming:
    """A summary of several measured steps of one rank and one mini-batch size.

    Attributes:
        samples: Size of the rank's mini-batch.
        steps: Number of steps that are summarised.
        own_s: Mean own time per step, in seconds.
        deviation_s: Standard deviation of the own time per step, in seconds.
        waiting_s: Median of the remaining seconds of a step, in which the rank may have waited for others.
    """

    samples: int
    steps: int
    own_s: float
    deviation_s: float = 0.0
    waiting_s: float = 0.0

    def to_numbers(self) -> list[float]:
        """Return the fields as floating-point numbers, which a collective can exchange."""
        return [float(value) for value in astuple(self)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> WindowTiming:
        """Return the object that :meth:`to_numbers` has described."""
        samples, steps, *seconds = numbers
        return cls(int(samples), int(steps), *seconds)


@dataclass(frozen=True)
class MemoryReading:
    """The memory use of one rank over some steps.

    Attributes:
        samples: Number of samples in the largest micro-batch.
        resident_bytes: Memory held between two steps.
        peak_bytes: Largest memory held during a step.
        budget_bytes: Memory that the rank may use.
    """

    samples: int
    resident_bytes: float
    peak_bytes: float
    budget_bytes: float

    def to_numbers(self) -> list[float]:
        """Return the fields as floating-point numbers, which a collective can exchange."""
        return [float(value) for value in astuple(self)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> MemoryReading:
        """Return the object that :meth:`to_numbers` has described."""
        samples, *sizes = numbers
        return cls(int(samples), *sizes)


@dataclass(frozen=True)
class StepTime:
    """The time that a rank needs for a mini-batch of n samples: ``overhead_s + seconds_per_sample * n``.

    Attributes:
        overhead_s: Overhead per step in seconds, whatever its size; not negative.
        seconds_per_sample: Cost per sample in seconds; positive.
    """

    overhead_s: float
    seconds_per_sample: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.overhead_s) and self.overhead_s >= 0):
            raise ConfigurationError(f"`overhead_s` must be finite and not negative, got {self.overhead_s}.")
        if not (math.isfinite(self.seconds_per_sample) and self.seconds_per_sample > 0):
            raise ConfigurationError(
                f"`seconds_per_sample` must be finite and positive, got {self.seconds_per_sample}."
            )

    def seconds(self, samples: float) -> float:
        """Return the predicted seconds of a step with ``samples`` samples."""
        return self.overhead_s + self.seconds_per_sample * samples

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Any) -> StepTime:
        """Return the object that :meth:`to_dict` has described.

        Raises:
            ConfigurationError: ``state`` has another form.
        """
        values = as_mapping(state, "step_time")
        return cls(*(as_float(entry(values, name), name) for name in ("overhead_s", "seconds_per_sample")))


@dataclass(frozen=True)
class BatchPlan:
    """The division of a global batch among the ranks.

    Attributes:
        samples: Mini-batch size of each rank, shape ``(world_size,)``.
    """

    samples: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.samples or any(n < 0 for n in self.samples) or sum(self.samples) < 1:
            raise ConfigurationError(
                f"`samples` must hold at least one sample and no negative size, got {self.samples}."
            )

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.samples)

    @property
    def global_batch_size(self) -> int:
        """The number of samples of all ranks together."""
        return sum(self.samples)

    @property
    def shares(self) -> tuple[float, ...]:
        """Positive numbers in the proportions of the plan; a rank without samples counts as half a sample."""
        return tuple(max(n, 0.5) for n in self.samples)

    @property
    def is_equal(self) -> bool:
        """Whether every rank has the same number of samples."""
        return len(set(self.samples)) == 1


@dataclass(frozen=True)
class BatchLimits:
    """The limits that every plan must respect.

    Attributes:
        max_samples: Maximum mini-batch size of each rank, shape ``(world_size,)``; None for no limit.
        batch_multiple: Number that every mini-batch size is a multiple of, except on one rank, which takes the
            remainder.
        min_samples: Fewest samples of every rank in plans that are searched for.
    """

    max_samples: tuple[int, ...] | None = None
    batch_multiple: int = 1
    min_samples: int = 1


@dataclass(frozen=True)
class BatchSlice:
    """A rank's part of one global batch, as it was actually drawn.

    Attributes:
        step: Training step, counted from 0 over all epochs; in evaluation, the batch index of the loader.
        rank: Rank that the part belongs to.
        plan: Samples of every rank; 0 for a rank for which a stand-in was drawn.
    """

    step: int
    rank: int
    plan: BatchPlan

    @property
    def samples(self) -> int:
        """The rank's number of samples; 0 if the batch had none for it and a stand-in was drawn."""
        return self.plan.samples[self.rank]

    @property
    def global_samples(self) -> int:
        """The number of samples of all ranks together."""
        return self.plan.global_batch_size

    @property
    def loss_weight(self) -> float:
        """The weight of the rank's mean loss with which the mean over ranks is the mean over samples."""
        return weight_in_mean(self.samples, self.global_samples, self.plan.world_size)


def weight_in_mean(terms: float, all_terms: float, world_size: int) -> float:
    """Return the weight of a mean over ``terms`` with which the mean over ranks is the mean over ``all_terms``.

    Averaging over W ranks divides by W, and the rank holds n of the N terms, so its weight is W * n / N; 0 if there are
    no terms at all.

    Example:
        >>> weight_in_mean(1, 4, world_size=2), weight_in_mean(0.75, 1.0, world_size=2), weight_in_mean(0, 0, 2)
        (0.5, 1.5, 0.0)
    """
    return world_size * terms / all_terms if all_terms else 0.0


@dataclass(frozen=True)
class PlanSchedule:
    """The plans of a training and the steps from which they hold.

    Attributes:
        first_steps: Steps from which the plans at the same positions hold; strictly increasing, starting with 0.
        plans: Plans, all with the same global batch size and the same number of ranks.
    """

    first_steps: tuple[int, ...]
    plans: tuple[BatchPlan, ...]

    def __post_init__(self) -> None:
        if len(self.first_steps) != len(self.plans) or not self.plans or self.first_steps[0] != 0:
            raise ConfigurationError(
                f"`first_steps` must start with 0 and have one entry per plan, got {self.first_steps} for {self.plans}."
            )
        if any(a >= b for a, b in pairwise(self.first_steps)):
            raise ConfigurationError(f"`first_steps` must increase strictly, got {self.first_steps}.")

    @classmethod
    def constant(cls, plan: BatchPlan) -> PlanSchedule:
        """Return a schedule that follows ``plan`` at every step."""
        return cls((0,), (plan,))

    def at(self, step: int) -> BatchPlan:
        """Return the plan of training step ``step`` (counted from 0 over all epochs)."""
        for first_step, plan in zip(reversed(self.first_steps), reversed(self.plans), strict=True):
            if first_step <= step:
                return plan
        return self.plans[0]

    def with_change(self, first_step: int, plan: BatchPlan) -> PlanSchedule:
        """Return a schedule that follows ``plan`` from ``first_step`` on.

        It replaces changes that were due at ``first_step`` or later.
        """
        kept = sum(1 for known in self.first_steps if known < first_step)
        return PlanSchedule((*self.first_steps[:kept], first_step), (*self.plans[:kept], plan))

    def to_dict(self) -> dict[str, Any]:
        """Return lists of plain numbers, for JSON and for checkpoints."""
        return {"first_steps": list(self.first_steps), "plans": [list(plan.samples) for plan in self.plans]}

    @classmethod
    def from_dict(cls, state: Any) -> PlanSchedule:
        """Return the object that :meth:`to_dict` has described.

        Raises:
            ConfigurationError: ``state`` has another form.
        """
        values = as_mapping(state, "schedule")
        first_steps = as_ints(entry(values, "first_steps"), "first_steps")
        plans = as_list(entry(values, "plans"), "plans", len(first_steps))
        world_size = len(as_list(plans[0], "plans")) if plans else 0
        return cls(first_steps, tuple(BatchPlan(as_ints(samples, "plans", world_size)) for samples in plans))
