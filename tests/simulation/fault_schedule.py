"""Draw the schedule of faults of a simulated training from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from simulation.simulate import Jitter

from lightning_hetero.balance.types import StepTime

__all__ = ["Fault", "FaultKind", "FaultSchedule", "draw_faults"]

FaultKind = Literal[
    "speed", "stall", "silent", "zero", "negative", "nan", "clock_jump", "memory", "replaced", "batch", "killed"
]
_KINDS: tuple[FaultKind, ...] = (
    "speed", "speed", "speed", "stall", "silent", "zero", "negative", "nan", "clock_jump", "memory", "replaced",
    "batch", "killed", "killed",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        tick: Time of the fault, in steps since the run was first started; steps that are repeated after a kill count
            again.
        kind: Kind of the fault. "speed" multiplies the rank's step time by ``value``, and "stall" does so for one step.
            "silent" makes the rank measure nothing for some steps; "zero", "negative" and "nan" make it measure such
            seconds. "clock_jump" adds ``value`` seconds to one measurement. "memory" limits the rank's micro-batches to
            ``value`` samples. "batch" changes the global batch to ``value`` samples at the next epoch. "killed"
            continues from the latest saved state on ``value`` ranks; "replaced" continues on the same number of ranks,
            and multiplies the rank's step time by ``value``.
        rank: Rank that the fault happens to.
        value: Number that ``kind`` explains.
    """

    tick: int
    kind: FaultKind
    rank: int
    value: float


@dataclass(frozen=True)
class FaultSchedule:
    """A run and its faults.

    Attributes:
        seed: Seed of the jitter.
        truth: Step time of each rank at first, shape ``(world_size,)``.
        spares: Step times of ranks that join later.
        global_batch_size: Global batch size at first.
        batch_multiple: Number that every mini-batch size is a multiple of, except on one rank.
        samples: Number of samples per epoch.
        read_ahead: Number of steps that each rank reads ahead, shape ``(world_size + spares,)``.
        save_every: Number of steps after which a state is saved.
        jitter: Variation of a rank's steps.
        faults: Faults in the order of their ticks.
        ticks: Number of steps to run.
    """

    seed: int
    truth: tuple[StepTime, ...]
    spares: tuple[StepTime, ...]
    global_batch_size: int
    batch_multiple: int
    samples: int
    read_ahead: tuple[int, ...]
    save_every: int
    jitter: Jitter
    faults: tuple[Fault, ...]
    ticks: int


def draw_faults(seed: int, world_size: int, faults: int = 6, apart: int = 40, quiet: int = 120) -> FaultSchedule:
    """Draw a schedule.

    Args:
        seed: Seed; equal seeds give equal schedules.
        world_size: Number of ranks at first.
        faults: Number of faults.
        apart: Maximum number of ticks between two faults.
        quiet: Number of ticks after the last fault.
    """
    rng = random.Random(f"{seed} {world_size}")
    multiple = rng.choice((1, 1, 1, 2, 4))
    spares = rng.randint(0, max(world_size // 2, 1))
    most_ranks = world_size + spares
    batch = multiple * rng.randint(8, 40) * most_ranks + rng.choice((0, 0, rng.randrange(multiple)))
    times = [_draw_step_time(rng, batch / most_ranks) for _ in range(most_ranks)]
    drawn, tick = [], 0
    for _ in range(faults):
        tick += rng.randint(1, apart)
        drawn.append(_draw_fault(rng, tick, world_size, most_ranks, batch, multiple))
    return FaultSchedule(
        seed=seed,
        truth=tuple(times[:world_size]),
        spares=tuple(times[world_size:]),
        global_batch_size=batch,
        batch_multiple=multiple,
        samples=batch * rng.randint(4, 30) + rng.choice((0, rng.randrange(batch))),
        read_ahead=tuple(rng.choice((0, 0, 1, 4)) for _ in range(most_ranks)),
        save_every=rng.choice((5, 17, 50)),
        jitter=Jitter(rng.choice((0.0, 0.01, 0.03)), rng.choice((0.0, 0.0, 0.01))),
        faults=tuple(drawn),
        ticks=tick + quiet,
    )


def _draw_step_time(rng: random.Random, samples: float) -> StepTime:
    """Draw the step time of a rank: some 0.1 to 0.6 s for an equal share, of which up to a third is overhead."""
    seconds, overhead = rng.choice((0.1, 0.1, 0.2, 0.3)) * rng.uniform(1, 2), rng.choice((0.0, 0.1, 0.3))
    return StepTime(seconds * overhead, seconds * (1 - overhead) / samples)


def _draw_fault(rng: random.Random, tick: int, world_size: int, most_ranks: int, batch: int, multiple: int) -> Fault:
    kind = rng.choice(_KINDS)
    values = {
        "speed": rng.choice((0.25, 0.5, 0.7, 1.3, 1.5, 2.0, 4.0)),
        "stall": rng.choice((3.0, 30.0, 1000.0)),
        "clock_jump": rng.choice((-1e9, -3600.0, 3600.0, 1e9)),
        "memory": multiple * rng.randint(1, max(batch // (multiple * world_size), 1)),
        "replaced": rng.choice((0.2, 0.5)),
        "batch": batch * rng.choice((1, 2, 3)) // rng.choice((1, 2)) // multiple * multiple,
        "killed": rng.choice((world_size, world_size, rng.randint(1, most_ranks))),
    }
    return Fault(tick, kind, rng.randrange(world_size), float(values.get(kind, 0.0)))
