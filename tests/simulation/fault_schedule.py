"""What goes wrong in a simulated training: a schedule of faults, drawn from a seed."""

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
    """One thing that goes wrong.

    Attributes:
        tick: when, in steps since the run was first started, those that are repeated behind a kill counted too.
        kind: "speed" multiplies the rank's step time by ``value``; "stall" does for one step; a rank that is "silent"
            measures nothing for some steps, or "zero", "negative" or "nan" seconds; "clock_jump" adds ``value`` seconds
            to one measurement; "memory" lets a pass of the rank hold ``value`` samples at most; "batch" changes the
            global batch to ``value`` samples at the next epoch; "killed" goes on from the state last saved on ``value``
            ranks; "replaced" does on as many, and the rank's time is multiplied by ``value``.
        rank: whose.
        value: see ``kind``.
    """

    tick: int
    kind: FaultKind
    rank: int
    value: float


@dataclass(frozen=True)
class FaultSchedule:
    """A run and what goes wrong in it.

    Attributes:
        seed: of the jitter.
        truth: the step time of each rank at first, shape ``(world_size,)``.
        spares: step times of ranks that join later.
        global_batch_size: samples that are divided at first.
        batch_multiple: every size is a multiple of it, but for one.
        samples: of an epoch.
        read_ahead: how many steps each rank reads ahead, shape ``(world_size + spares,)``.
        save_every: a state is saved behind so many steps.
        jitter: what makes a rank's steps differ.
        faults: in the order of ticks.
        ticks: steps to run.
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
        seed: equal seeds give equal schedules.
        world_size: number of ranks at first.
        faults: how many things go wrong.
        apart: most ticks between two of them.
        quiet: ticks behind the last one.
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
    """Draw a rank that takes some 0.1 to 0.6 s for an equal share, of which up to a third is overhead."""
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
