"""The values that cross layers: frozen, of plain numbers and strings, and therefore JSON-able.

A plan travels from the solver through a broadcast into a sampler, a table and a checkpoint without being
translated on the way.
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
    """What a rank runs on.

    Attributes:
        host: name of the machine.
        device: where on that machine, for example ``"cuda:0"`` or ``"cpu"``.
        name: the model, for example ``"Tesla V100-SXM2-16GB"``.
        nominal_speed: how fast the device is by its data, comparable among devices for which it is known; None where
            it is not.
    """

    host: str
    device: str
    name: str
    nominal_speed: float | None = None

    def to_dict(self) -> dict[str, str | float | None]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class StepTiming:
    """One measured step of one rank.

    Attributes:
        samples: size of the rank's mini-batch.
        own_s: the rank's own time, which counts no waiting for other ranks.
        waiting_s: the rest of the step, in which the rank may have waited for others.
    """

    samples: int
    own_s: float
    waiting_s: float = 0.0


@dataclass(frozen=True)
class WindowTiming:
    """Several measured steps of one rank and one size, in a few numbers.

    Attributes:
        samples: size of the rank's mini-batch.
        steps: how many steps the numbers are of.
        own_s: mean own time of a step.
        deviation_s: standard deviation of a step's own time.
        waiting_s: median of the rest of a step, in which the rank may have waited for others.
    """

    samples: int
    steps: int
    own_s: float
    deviation_s: float = 0.0
    waiting_s: float = 0.0

    def to_numbers(self) -> list[float]:
        """Return the fields as floating-point numbers, fit for a collective."""
        return [float(value) for value in astuple(self)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> WindowTiming:
        """Return what :meth:`to_numbers` described."""
        samples, steps, *seconds = numbers
        return cls(int(samples), int(steps), *seconds)


@dataclass(frozen=True)
class MemoryReading:
    """The memory of one rank over some steps.

    Attributes:
        samples: of the largest pass.
        resident_bytes: held between two steps.
        peak_bytes: held at most.
        budget_bytes: what the rank may hold.
    """

    samples: int
    resident_bytes: float
    peak_bytes: float
    budget_bytes: float

    def to_numbers(self) -> list[float]:
        """Return the fields as floating-point numbers, fit for a collective."""
        return [float(value) for value in astuple(self)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> MemoryReading:
        """Return what :meth:`to_numbers` described."""
        samples, *sizes = numbers
        return cls(int(samples), *sizes)


@dataclass(frozen=True)
class StepTime:
    """How long a rank takes for a mini-batch of n samples: ``overhead_s + seconds_per_sample * n``.

    Attributes:
        overhead_s: what a step costs whatever its size; not negative.
        seconds_per_sample: what each further sample costs; positive.
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
        """Return the predicted duration in seconds of a step on ``samples`` samples."""
        return self.overhead_s + self.seconds_per_sample * samples

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Any) -> StepTime:
        """Return what :meth:`to_dict` described.

        Raises:
            ConfigurationError: it is something else.
        """
        values = as_mapping(state, "step_time")
        return cls(*(as_float(entry(values, name), name) for name in ("overhead_s", "seconds_per_sample")))


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided.

    Attributes:
        samples: mini-batch size of each rank, shape ``(world_size,)``.
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
        """Positive numbers in these proportions; half a sample stands for none."""
        return tuple(max(n, 0.5) for n in self.samples)

    @property
    def is_equal(self) -> bool:
        """Whether every rank has the same number of samples."""
        return len(set(self.samples)) == 1


@dataclass(frozen=True)
class BatchLimits:
    """What every plan has to respect.

    Attributes:
        max_samples: most samples a rank can hold, shape ``(world_size,)``, or None for no limit.
        batch_multiple: every size is a multiple of this, but for one rank that takes the remainder.
    """

    max_samples: tuple[int, ...] | None = None
    batch_multiple: int = 1


@dataclass(frozen=True)
class BatchSlice:
    """A rank's part of one global batch, as it was really drawn.

    Attributes:
        step: training step, counted from 0 over all epochs (in evaluation: batch of the loader).
        rank: whose part it is.
        plan: the samples of every rank; 0 for a rank for which a stand-in was drawn.
    """

    step: int
    rank: int
    plan: BatchPlan

    @property
    def samples(self) -> int:
        """The rank's samples; 0 where the batch had none for it and a stand-in was drawn."""
        return self.plan.samples[self.rank]

    @property
    def global_samples(self) -> int:
        """The samples of all ranks together."""
        return self.plan.global_batch_size

    @property
    def loss_weight(self) -> float:
        """What the rank's mean loss counts, such that the mean over ranks is the mean over samples."""
        return weight_in_mean(self.samples, self.global_samples, self.plan.world_size)


def weight_in_mean(terms: int, all_terms: int, world_size: int) -> float:
    """Return what a rank's mean over ``terms`` counts, such that the mean over ranks is the mean over ``all_terms``.

    Averaging over W ranks divides by W, and the rank holds n of the N terms, so its weight is W * n / N.

    Example:
        >>> weight_in_mean(1, 4, world_size=2), weight_in_mean(3, 4, world_size=2)
        (0.5, 1.5)
    """
    return world_size * terms / max(all_terms, 1)


@dataclass(frozen=True)
class PlanSchedule:
    """Which plan holds at which training step.

    Attributes:
        first_steps: the step from which the plan of the same position holds; strictly increasing, starts with 0.
        plans: the plans, of one global batch size and one number of ranks each.
    """

    first_steps: tuple[int, ...]
    plans: tuple[BatchPlan, ...]

    def __post_init__(self) -> None:
        if len(self.first_steps) != len(self.plans) or not self.plans or self.first_steps[0] != 0:
            raise ConfigurationError(
                f"`first_steps` must start with 0 and have one entry a plan, got {self.first_steps} for {self.plans}."
            )
        if any(a >= b for a, b in pairwise(self.first_steps)):
            raise ConfigurationError(f"`first_steps` must increase, got {self.first_steps}.")

    @classmethod
    def constant(cls, plan: BatchPlan) -> PlanSchedule:
        """Return the schedule that follows ``plan`` at every step."""
        return cls((0,), (plan,))

    def at(self, step: int) -> BatchPlan:
        """Return the plan of training step ``step`` (counted from 0 over all epochs)."""
        for first_step, plan in zip(reversed(self.first_steps), reversed(self.plans), strict=True):
            if first_step <= step:
                return plan
        return self.plans[0]

    def with_change(self, first_step: int, plan: BatchPlan) -> PlanSchedule:
        """Return a schedule that follows ``plan`` from ``first_step`` on.

        Changes that were due at ``first_step`` or later are replaced.
        """
        kept = sum(1 for known in self.first_steps if known < first_step)
        return PlanSchedule((*self.first_steps[:kept], first_step), (*self.plans[:kept], plan))

    def to_dict(self) -> dict[str, Any]:
        """Return lists of plain numbers, fit for JSON and for a checkpoint."""
        return {"first_steps": list(self.first_steps), "plans": [list(plan.samples) for plan in self.plans]}

    @classmethod
    def from_dict(cls, state: Any) -> PlanSchedule:
        """Return what :meth:`to_dict` described.

        Raises:
            ConfigurationError: it is something else.
        """
        values = as_mapping(state, "schedule")
        first_steps = as_ints(entry(values, "first_steps"), "first_steps")
        plans = as_list(entry(values, "plans"), "plans", len(first_steps))
        world_size = len(as_list(plans[0], "plans")) if plans else 0
        return cls(first_steps, tuple(BatchPlan(as_ints(samples, "plans", world_size)) for samples in plans))
