"""Drawn faults on simulated ranks: no plan breaks a rule, no sample is lost, the balance is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, pairwise

import profiles
import pytest
from simulation.fault_schedule import Fault, FaultSchedule, draw_faults
from simulation.fault_simulation import DrawnStep, FaultRun, simulate_faults

from lightning_hetero.balance.batch.batch_solver import keeps_limits
from lightning_hetero.balance.batch.blocks import Cursor
from lightning_hetero.balance.batch.sharding import plan_for_block
from lightning_hetero.distributed.data.global_batches import CutBatches
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler

SCHEDULES, CHUNK = profiles.drawn(200, 2_000), 50
# Number of steps after the last fault until the plan is within 5 % of the best one and a multiple of samples.
STEPS_TO_BALANCE = 60
# The same by seed: a rank that is suddenly six times as slow and has been measured in a single step, and jitter of 3 %
# on sixteen ranks.
LATE = {1163: 80, 1634: 100}
# Epochs of three global batches leave a single whole step per window.
UNSETTLED = {1305}


def world_size_of(seed: int) -> int:
    return 64 if seed % 50 == 0 else 2 + seed % 15


def check_plans(run: FaultRun) -> None:
    for judged in run.judged:
        plan = judged.decision.plan
        assert plan.global_batch_size == judged.global_batch_size
        assert min(plan.samples) >= 1
        assert keeps_limits(plan, judged.limits), judged  # the simulation asks for limits that can be kept


class Kept:
    """Global batches that are cut only once, for all ranks."""

    def __init__(self, cut: CutBatches) -> None:
        self.order, self.size, self.size_at = cut.order, cut.size, cut.size_at
        self._blocks = list(cut.since(0))

    def __len__(self) -> int:
        return len(self._blocks)

    def since(self, block: int) -> Iterator[list[int]]:
        return islice(self._blocks, block, None)


def parts_of_steps(drawn: Sequence[DrawnStep], samples: int) -> list[list[list[int]]]:
    """Return the samples that each rank's sampler draws for consecutive steps of one epoch."""
    first = drawn[0]
    batches = Kept(CutBatches(range(samples), first.global_batch_size, drop_last=False))
    parts: list[list[list[int]]] = [[] for _ in drawn]
    for rank in range(len(first.plans)):
        sampler = ShareBatchSampler(
            batches,
            batch_size=1,
            drop_last=False,
            rank=rank,
            plan_of=lambda cursor, size, r=rank: plan_for_block(drawn[cursor.step - first.step].plans[r], size),  # type: ignore[misc]
            begin=lambda: Cursor(first.step, first.block, first.block),
        )
        for part, batch in zip(parts, islice(sampler, len(drawn)), strict=True):
            part.append(batch if sampler.slices.popleft().samples else [])
    return parts


def check_ledger(run: FaultRun, samples: int) -> None:
    """Check that each sample was trained on once in each epoch, and at most once in the last one."""
    assert [drawn.step for drawn in run.drawn] == list(range(len(run.drawn)))
    seen: dict[int, list[int]] = {}
    stretch: list[DrawnStep] = []
    for drawn, following in pairwise([*run.drawn, None]):
        assert drawn is not None
        stretch.append(drawn)
        if following is None or (drawn.epoch, len(drawn.plans)) != (following.epoch, len(following.plans)):
            of_epoch = seen.setdefault(drawn.epoch, [])
            for batch in chain.from_iterable(parts_of_steps(stretch, samples)):
                of_epoch += batch
            stretch = []
    epochs = list(seen)
    assert epochs == list(range(len(epochs)))
    for epoch in epochs[:-1]:
        assert sorted(seen[epoch]) == list(range(samples))
    assert len(set(seen[epochs[-1]])) == len(seen[epochs[-1]])


def check_balance(schedule: FaultSchedule, run: FaultRun) -> int:
    steps = run.ticks_until(0.05, schedule.faults[-1].tick)
    if schedule.seed in UNSETTLED:
        return schedule.ticks
    assert steps is not None
    assert steps <= LATE.get(schedule.seed, STEPS_TO_BALANCE)
    return steps


@pytest.mark.parametrize("first", range(0, SCHEDULES, CHUNK))
def test_faults_break_no_rule_lose_no_sample_and_leave_the_balance_to_be_found(first: int) -> None:
    """Each run has 2 to 16 ranks, every fiftieth 64, and six faults of eleven kinds."""
    for seed in range(first, first + CHUNK):
        schedule = draw_faults(seed, world_size_of(seed))
        run = simulate_faults(schedule)
        check_plans(run)
        check_ledger(run, schedule.samples)
        check_balance(schedule, run)


def test_every_kind_of_fault_is_drawn_and_a_killed_run_continues() -> None:
    drawn = [draw_faults(seed, world_size_of(seed)) for seed in range(200)]
    kinds = Counter(fault.kind for schedule in drawn for fault in schedule.faults)
    assert min(kinds.values()) > 20
    assert len(kinds) == 11
    assert draw_faults(7, 4) == draw_faults(7, 4) != draw_faults(8, 4)
    with_spares = next(schedule for schedule in drawn if schedule.spares)
    killed = replace(with_spares, faults=(Fault(30, "killed", 0, len(with_spares.truth) + 1),), ticks=60)
    run = simulate_faults(killed)
    assert run.resumes == 1
    assert len(run.drawn) < killed.ticks
    assert len(run.drawn[-1].plans) == len(killed.truth) + 1


def test_a_plan_that_comes_too_early_on_one_rank_is_noticed() -> None:
    schedule = replace(draw_faults(5, 4), faults=(Fault(50, "speed", 2, 3.0),), samples=100_000)
    run = simulate_faults(schedule)
    check_ledger(run, schedule.samples)
    changed = next(i for i, (a, b) in enumerate(pairwise(run.drawn)) if a.plans != b.plans)
    early = replace(run.drawn[changed], plans=(run.drawn[changed + 1].plans[0], *run.drawn[changed].plans[1:]))
    with pytest.raises(AssertionError):
        check_ledger(replace(run, drawn=(*run.drawn[:changed], early, *run.drawn[changed + 1 :])), schedule.samples)


@pytest.mark.parametrize(
    ("seed", "world_size"),
    [
        pytest.param(93, 5, id="two long steps in one window"),
        pytest.param(85, 12, id="a clock that jumps in a window of one step"),
        pytest.param(14, 16, id="a clock that jumps in the first window"),
        pytest.param(358, 15, id="a change of speed at the time of a change of plan"),
        pytest.param(398, 10, id="a change of speed when the size has changed by one"),
        pytest.param(427, 9, id="a change of speed and a long step in one window"),
        pytest.param(955, 12, id="a few per cent that jitter hides"),
    ],
)
def test_faults_that_once_prevented_the_balance_no_longer_do(seed: int, world_size: int) -> None:
    schedule = draw_faults(seed, world_size)
    check_balance(schedule, simulate_faults(schedule))
