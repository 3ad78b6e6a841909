"""Every position has one owner under any plan; equal plans divide as DistributedSampler does."""

from __future__ import annotations

import pytest
from generators import plans
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn
from torch.utils.data import DistributedSampler

from lightning_hetero.balance.batch.sharding import plan_for_block, positions_of_rank
from lightning_hetero.balance.types import BatchPlan


@settings(max_examples=drawn(100, 600))
@given(plans())
def test_every_position_has_one_owner(plan: BatchPlan) -> None:
    owned = [positions_of_rank(plan, rank) for rank in range(plan.world_size)]
    assert [len(positions) for positions in owned] == list(plan.samples)
    assert sorted(p for positions in owned for p in positions) == list(range(plan.global_batch_size))
    assert all(list(positions) == sorted(positions) for positions in owned)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_equal_ranks_own_what_distributed_sampler_gives_them(world_size: int) -> None:
    """Not only the same global batch, but the same mini-batch on each rank as under plain DDP."""
    plan = BatchPlan((4,) * world_size)
    for rank in range(world_size):
        theirs = list(DistributedSampler(range(4 * world_size), world_size, rank, shuffle=False))  # type: ignore[var-annotated, arg-type]
        assert list(positions_of_rank(plan, rank)) == theirs


@settings(max_examples=drawn(100, 600))
@given(plans(), st.integers(1, 200))
def test_a_block_of_another_size_is_divided_in_proportion(plan: BatchPlan, size: int) -> None:
    block = plan_for_block(plan, size)
    assert block.global_batch_size == size
    assert block.samples[0] >= 1
    if size >= plan.world_size:
        assert min(block.samples) >= 1
    for share, samples in zip(plan.samples, block.samples, strict=True):
        exact = size * share / plan.global_batch_size
        assert abs(samples - exact) < 1 + plan.world_size


def test_a_full_block_has_the_plan_itself() -> None:
    plan = BatchPlan((3, 9))
    assert plan_for_block(plan, 12) == plan


def test_few_samples_go_to_rank_zero_first() -> None:
    """What users log from rank 0 must come from real data."""
    assert plan_for_block(BatchPlan((1, 50, 50)), 1).samples == (1, 0, 0)
    assert plan_for_block(BatchPlan((1, 50, 50)), 2).samples == (1, 1, 0)
    assert plan_for_block(BatchPlan((1, 50, 50)), 3).samples == (1, 1, 1)


def test_a_rank_without_a_share_stays_without() -> None:
    assert plan_for_block(BatchPlan((0, 6, 2)), 4).samples == (0, 3, 1)
    assert plan_for_block(BatchPlan((0, 6, 2)), 1).samples == (0, 1, 0)
