"""Over all ranks every sample of an epoch is drawn once, whatever the plans, the loaders and the changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn

from lightning_hetero.balance.batch.blocks import (
    Blocks,
    Cursor,
    block_in_step,
    divide_together,
    merge_slices,
    uneven_steps,
)
from lightning_hetero.balance.batch.sharding import plan_for_block
from lightning_hetero.balance.types import BatchPlan, BatchSlice, PlanSchedule
from lightning_hetero.distributed.data.global_batches import CutBatches
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler


@dataclass(frozen=True)
class Case:
    """A draw of everything that decides who draws what."""

    schedule: PlanSchedule
    size: int
    drop_last: bool
    least: int
    first_block: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world_size = draw(st.integers(1, 6))
    batch = draw(st.integers(world_size, 30))

    def plan() -> BatchPlan:
        cuts = sorted(draw(st.lists(st.integers(0, batch), min_size=world_size - 1, max_size=world_size - 1)))
        return BatchPlan(tuple(b - a for a, b in pairwise([0, *cuts, batch])))

    schedule = PlanSchedule.constant(plan())
    for step in sorted(draw(st.sets(st.integers(1, 10), max_size=4))):
        schedule = schedule.with_change(step, plan())
    return Case(
        schedule=schedule,
        size=draw(st.integers(0, 250)),
        drop_last=draw(st.booleans()),
        least=draw(st.sampled_from([1, world_size])),
        first_block=draw(st.integers(0, 12)),
    )


def draw_all(case: Case, first: int, cut: CutBatches, off_by_one: bool = False) -> list[list[list[int]]]:
    """Return the samples of each rank in each step, stand-ins left out."""
    drawn = []
    for rank in range(case.schedule.plans[0].world_size):
        shares = ShareBatchSampler(
            cut,
            batch_size=1,
            drop_last=case.drop_last,
            rank=rank,
            plan_of=lambda cursor, size: plan_for_block(case.schedule.at(cursor.step), size),
            begin=lambda: Cursor(step=first, position=first, block=first),
        )
        batches = list(shares)
        assert [part.step for part in shares.slices] == list(range(first, first + len(batches)))
        real = [batch if part.samples else [] for batch, part in zip(batches, shares.slices, strict=True)]
        assert [len(batch) for batch in real] == [part.samples for part in shares.slices]
        for part in shares.slices:
            assert math.isclose(sum(part.plan.samples), part.global_samples)
        drawn.append([[i + 1 for i in batch] for batch in real] if off_by_one and rank else real)
    return drawn


def check(case: Case, off_by_one: bool = False) -> None:
    order = list(range(1000, 1000 + case.size))
    batch = case.schedule.plans[0].global_batch_size
    cut = CutBatches(order, batch, drop_last=case.drop_last, least=case.least)
    first = min(case.first_block, len(cut))
    sizes = [cut.size_at(block) for block in range(len(cut))]
    used = len(order) // batch * batch if case.drop_last else len(order)
    assert sum(sizes) == used
    assert all(0 < size <= batch for size in sizes)
    if len(sizes) > 1 and batch >= 2 * case.least:
        assert min(sizes) >= case.least
    drawn = draw_all(case, first, cut, off_by_one)
    assert {len(batches) for batches in drawn} == {len(cut) - first}
    start = sum(sizes[:first])
    for size, parts in zip(sizes[first:], zip(*drawn, strict=True), strict=True):
        assert sorted(index for part in parts for index in part) == order[start : start + size]
        start += size
    assert start == used


@settings(max_examples=drawn(1_000, 20_000))
@given(cases())
def test_no_sample_is_lost_or_repeated(case: Case) -> None:
    """Draws of world size, shares, changes, data size, batch size, ragged ends and where to go on."""
    check(case)


def test_a_slice_that_is_off_by_one_is_caught() -> None:
    case = Case(PlanSchedule.constant(BatchPlan((2, 3))), 12, drop_last=False, least=1, first_block=0)
    check(case)
    try:
        check(case, off_by_one=True)
    except AssertionError:
        return
    raise AssertionError("nothing noticed it")


@settings(max_examples=drawn(400, 4_000))
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12), st.booleans()), min_size=1, max_size=3),
    st.sampled_from(["max_size_cycle", "max_size", "min_size"]),
)
def test_loaders_that_are_divided_together_give_every_rank_one_fraction(
    shares: list[int], loaders: list[tuple[int, int, bool]], mode: str
) -> None:
    plan = BatchPlan(tuple(shares))
    blocks = [b for b in (Blocks(entries, size, drop) for entries, size, drop in loaders) if len(b)]
    lengths = [len(b) for b in blocks]
    uneven = uneven_steps(blocks, mode) if blocks else []
    for position in range((min if mode == "min_size" else max)(lengths, default=0)):
        chosen = [(b, block_in_step(position, len(b), mode)) for b in blocks]
        sizes = tuple(b.size_at(block) for b, block in chosen if block is not None)
        plans = divide_together(plan, sizes)
        assert [p.global_batch_size for p in plans] == list(sizes)
        parts = [merge_slices([BatchSlice(position, rank, p) for p in plans]) for rank in range(len(shares))]
        assert len({part.plan for part in parts}) == 1
        for part in parts:
            for p in plans:
                assert p.samples[part.rank] * part.global_samples == part.samples * p.global_batch_size
        whole = all(b.size_at(block) == b.size for b, block in chosen if block is not None)
        assert whole or sizes in uneven
