"""The slices of all ranks make up the epoch, whatever the plans and whenever they change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.balance.batch.blocks import Cursor
from lightning_hetero.balance.batch.sharding import plan_for_block
from lightning_hetero.balance.types import BatchPlan, BatchSlice, PlanSchedule
from lightning_hetero.distributed.data.global_batches import CutBatches
from lightning_hetero.distributed.data.share_loader import share_loader
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler


def sampler_of(
    rank: int,
    size: int,
    schedule: PlanSchedule,
    *,
    drop_last: bool = False,
    stand_in: bool = True,
    plan_at: Callable[[int], BatchPlan] | None = None,
    begin: Cursor | None = None,
) -> ShareBatchSampler:
    plan = schedule.plans[0]
    at = plan_at or schedule.at
    return ShareBatchSampler(
        CutBatches(list(range(100, 100 + size)), plan.global_batch_size, drop_last=drop_last),
        batch_size=plan.global_batch_size // plan.world_size,
        drop_last=drop_last,
        rank=rank,
        plan_of=lambda cursor, block_size: plan_for_block(at(cursor.step), block_size),
        begin=lambda: begin or Cursor(),
        stand_in=stand_in,
    )


@st.composite
def schedules(draw: st.DrawFn) -> PlanSchedule:
    world_size = draw(st.integers(1, 5))
    batch = draw(st.integers(world_size + 1, 24))
    first_steps = sorted(draw(st.sets(st.integers(1, 12), max_size=4)))

    def plan() -> BatchPlan:
        inner = draw(st.lists(st.integers(1, batch - 1), min_size=world_size - 1, max_size=world_size - 1, unique=True))
        cuts = [0, *sorted(inner), batch]
        return BatchPlan(tuple(b - a for a, b in pairwise(cuts)))

    schedule = PlanSchedule.constant(plan())
    for step in first_steps:
        schedule = schedule.with_change(step, plan())
    return schedule


@settings(max_examples=drawn(100, 600))
@given(schedules(), st.integers(0, 200), st.booleans())
def test_every_sample_of_every_global_batch_once(schedule: PlanSchedule, size: int, drop_last: bool) -> None:
    world_size, batch = schedule.plans[0].world_size, schedule.plans[0].global_batch_size
    drawn, slices = [], []
    for rank in range(world_size):
        sampler = sampler_of(rank, size, schedule, drop_last=drop_last)
        batches = list(sampler)
        assert len(batches) == len(sampler) == (size // batch if drop_last else -(-size // batch))
        slices.append(list(sampler.slices))
        real = [b if s.samples else [] for b, s in zip(batches, sampler.slices, strict=True)]
        assert [len(b) for b in real] == [s.samples for s in sampler.slices]
        drawn.append(real)
    for step, parts in enumerate(zip(*drawn, strict=True)):
        block = list(range(100 + step * batch, 100 + min((step + 1) * batch, size)))
        assert sorted(index for part in parts for index in part) == block
        assert {s[step].global_samples for s in slices} == {len(block)}
        assert sum(s[step].loss_weight for s in slices) == pytest.approx(world_size)
        if len(block) == batch:
            assert tuple(len(part) for part in parts) == schedule.at(step).samples


def test_a_rank_without_a_sample_stands_in_or_stops() -> None:
    schedule = PlanSchedule.constant(BatchPlan((2, 2, 2)))
    stand_in = sampler_of(2, 7, schedule)
    assert list(stand_in)[-1] == [106, 106]
    assert stand_in.slices[-1] == BatchSlice(1, 2, BatchPlan((1, 0, 0)))
    assert stand_in.slices[-1].loss_weight == 0.0
    stop = sampler_of(2, 7, schedule, stand_in=False)
    assert len(list(stop)) == 1
    assert len(stop) == len(sampler_of(0, 7, schedule, stand_in=False)) == 2, "the ranks' lengths differ"


def test_an_epoch_begins_at_the_step_at_which_it_is_begun() -> None:
    schedule = PlanSchedule.constant(BatchPlan((2, 2))).with_change(10, BatchPlan((1, 3)))
    sampler = sampler_of(0, 12, schedule, begin=Cursor(step=9))
    assert [len(batch) for batch in sampler] == [2, 1, 1]
    assert sampler.fetched_through == 11


class Observer:
    def __init__(self) -> None:
        self.asked = 0
        self.handed_out: list[BatchSlice] = []

    def before_fetch(self) -> None:
        self.asked += 1

    def after_fetch(self, batch_slice: BatchSlice) -> None:
        self.handed_out.append(batch_slice)


def indices(samples: list[tuple[torch.Tensor]]) -> list[int]:
    return [int(index) for (index,) in samples]


class LoaderWithOwnArguments(DataLoader[int]):
    """A subclass that cannot be constructed again from its attributes."""

    def __init__(self, secret: object, size: int, **kwargs: object) -> None:
        super().__init__(range(200), **kwargs)  # type: ignore[arg-type]
        self.length = len(str(secret)) + size

    def collate(self) -> str:
        return "still here"


def double(values: list[int]) -> list[int]:
    return [2 * v for v in values]


@pytest.mark.parametrize("workers", [{"num_workers": 0}, {"num_workers": 2, "persistent_workers": True}])
def test_a_loader_keeps_everything_but_its_batches(workers: dict[str, object]) -> None:
    schedule = PlanSchedule.constant(BatchPlan((1, 3)))
    sampler, observer = sampler_of(1, 9, schedule), Observer()
    original = LoaderWithOwnArguments("abc", 4, batch_size=2, collate_fn=double, in_order=False, **workers)
    shared = share_loader(original, sampler, observer.before_fetch, observer.after_fetch)
    for epoch in (1, 2):
        expected = [[2 * i for i in batch] for batch in sampler]
        assert list(shared) == expected
        assert len(shared) == 3
        assert [s.samples for s in observer.handed_out] == [3, 3, 0] * epoch
        assert observer.asked == 4 * epoch
    assert shared.in_order, "batches that overtake each other could not be paired with their slices"
    assert isinstance(shared, LoaderWithOwnArguments)
    assert (shared.collate(), shared.length) == ("still here", 7)
    assert len(original) == 100
    assert sorted(original)[0] == [0, 2], "the original loader is left as it was; in_order=False lets batches overtake"


def test_a_change_takes_effect_after_what_workers_have_read_ahead() -> None:
    """Two workers read several batches ahead; batch and slice stay together, and no sample is lost or repeated."""
    schedules = [PlanSchedule.constant(BatchPlan((2, 2)))]
    seen: list[list[int]] = []
    samplers = [sampler_of(r, 80, schedules[0], plan_at=lambda step: schedules[0].at(step)) for r in (0, 1)]
    observers = [Observer(), Observer()]
    datasets = [DataLoader(TensorDataset(torch.arange(200)), num_workers=2 * r, collate_fn=indices) for r in (0, 1)]
    loaders = [
        share_loader(dataset, sampler, observer.before_fetch, observer.after_fetch)
        for dataset, sampler, observer in zip(datasets, samplers, observers, strict=True)
    ]
    iterators = [iter(loader) for loader in loaders]
    for step in range(20):
        parts = [next(iterator) for iterator in iterators]
        for part, observer in zip(parts, observers, strict=True):
            assert observer.handed_out[-1].step == step
            assert observer.handed_out[-1].samples == len(part)
        seen.append(sorted(parts[0] + parts[1]))
        if step == 6:
            assert samplers[1].fetched_through > samplers[0].fetched_through == 6
            change = max(sampler.fetched_through for sampler in samplers) + 1
            schedules[0] = schedules[0].with_change(change, BatchPlan((1, 3)))
    assert seen == [list(range(100 + 4 * step, 104 + 4 * step)) for step in range(20)]
    sizes = [s.samples for s in observers[0].handed_out]
    assert sizes == [2] * change + [1] * (20 - change)
