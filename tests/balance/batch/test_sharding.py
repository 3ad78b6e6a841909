"""Every position has one owner under any plan; equal plans divide as DistributedSampler does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from generators import plans
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn
from torch.utils.data import DistributedSampler

from lightning_hetero.balance.batch.batch_solver import keeps_limits
from lightning_hetero.balance.batch.sharding import plan_for_block, positions_of_rank
from lightning_hetero.balance.types import BatchLimits, BatchPlan
from lightning_hetero.exceptions import InfeasiblePlanError


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
    if size >= 2 * plan.world_size:
        if size != plan.global_batch_size:
            assert min(block.samples) >= 2
        for share, samples in zip(plan.samples, block.samples, strict=True):
            exact = size * share / plan.global_batch_size
            assert abs(samples - exact) < 1 + 2 * plan.world_size


def keeps(samples: tuple[int, ...], plan: BatchPlan, limits: BatchLimits) -> bool:
    return keeps_limits(BatchPlan(samples), limits) and all(
        share or not n for n, share in zip(samples, plan.samples, strict=True)
    )


def lone(samples: Sequence[int], limits: BatchLimits, least: int) -> int:
    """Return on how many ranks samples are fewer than needed, although their limits allow for more."""
    caps = limits.max_samples or (least,) * len(samples)
    return sum(0 < n < min(least, cap) for n, cap in zip(samples, caps, strict=True))


@st.composite
def ragged(draw: st.DrawFn) -> tuple[BatchPlan, BatchLimits, int]:
    """Draw a plan, limits that it keeps, and the size of a smaller block."""
    multiple = draw(st.integers(1, 4))
    units = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    samples = [multiple * n for n in units]
    samples[draw(st.integers(0, len(samples) - 1))] += draw(st.integers(0, multiple - 1))
    caps = tuple(n + draw(st.integers(0, 3)) for n in samples) if draw(st.booleans()) else None
    plan = BatchPlan(tuple(samples))
    return plan, BatchLimits(caps, multiple), draw(st.integers(1, plan.global_batch_size))


@settings(max_examples=drawn(300, 2000))
@given(ragged(), st.sampled_from([1, 2]))
def test_a_ragged_block_keeps_the_limits_and_leaves_no_rank_with_one_sample(
    case: tuple[BatchPlan, BatchLimits, int], least: int
) -> None:
    """Compared with all divisions: none is better, first in lone samples, then in ranks that have some."""
    plan, limits, size = case
    if size == plan.global_batch_size:
        return
    found = plan_for_block(plan, size, limits, least).samples
    assert sum(found) == size
    assert keeps(found, plan, limits)
    possible = [
        samples
        for samples in product(*(range(min(share and size, size) + 1) for share in plan.samples))
        if sum(samples) == size and keeps(samples, plan, limits)
    ]
    fewest = min(lone(samples, limits, least) for samples in possible)
    assert lone(found, limits, least) == fewest or fewest > 0 or size < least  # a single sample is rank 0's
    best = [samples for samples in possible if not lone(samples, limits, least)]
    if best and plan.samples[0] and any(samples[0] for samples in best):
        assert found[0], "what is logged on rank 0 does not come from real data"
        best = [samples for samples in best if samples[0]]
    if best and limits.max_samples is None:
        assert sum(map(bool, found)) == max(sum(map(bool, samples)) for samples in best)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_equal_ranks_keep_what_distributed_sampler_gives_them_in_a_ragged_block(world_size: int) -> None:
    """Without the duplicates with which it pads, from two samples for each rank on."""
    plan = BatchPlan((8,) * world_size)
    for size in range(2 * world_size, 8 * world_size):
        block = plan_for_block(plan, size)
        for rank in range(world_size):
            assert list(positions_of_rank(block, rank)) == list(range(rank, size, world_size))


def test_a_full_block_has_the_plan_itself() -> None:
    plan = BatchPlan((3, 9))
    assert plan_for_block(plan, 12) == plan
    assert plan_for_block(BatchPlan((1, 3)), 4) == BatchPlan((1, 3))


def test_few_samples_go_to_rank_zero_first() -> None:
    """What users log from rank 0 must come from real data."""
    assert plan_for_block(BatchPlan((1, 50, 50)), 1).samples == (1, 0, 0)
    assert plan_for_block(BatchPlan((1, 50, 50)), 2).samples == (2, 0, 0)
    assert plan_for_block(BatchPlan((1, 50, 50)), 2, min_samples=1).samples == (1, 1, 0)
    assert plan_for_block(BatchPlan((1, 50, 50)), 3, min_samples=1).samples == (1, 1, 1)


def test_batch_normalisation_gets_two_samples_where_they_are_there() -> None:
    assert plan_for_block(BatchPlan((2, 6)), 6).samples == (2, 4)
    assert plan_for_block(BatchPlan((4, 4)), 3).samples == (3, 0)
    assert plan_for_block(BatchPlan((4, 4, 4)), 5).samples == (3, 2, 0)
    # a limit of one sample is the user's
    assert plan_for_block(BatchPlan((1, 1, 1)), 2, BatchLimits((1, 1, 1))).samples == (1, 1, 0)


def test_multiples_hold_on_all_ranks_but_one() -> None:
    assert plan_for_block(BatchPlan((2, 6)), 4, BatchLimits(batch_multiple=2)).samples == (2, 2)
    assert plan_for_block(BatchPlan((8, 24)), 10, BatchLimits(batch_multiple=8)).samples == (8, 2)
    assert plan_for_block(BatchPlan((8, 24)), 9, BatchLimits(batch_multiple=8)).samples == (9, 0)


def test_limits_too_low_for_a_larger_block_are_named() -> None:
    with pytest.raises(InfeasiblePlanError, match="`max_batch_size` must together hold the global batch of 9"):
        plan_for_block(BatchPlan((2, 6)), 9, BatchLimits((2, 6)))


def test_a_rank_without_a_share_stays_without() -> None:
    assert plan_for_block(BatchPlan((0, 6, 2)), 5).samples == (0, 3, 2)
    assert plan_for_block(BatchPlan((0, 6, 2)), 1).samples == (0, 1, 0)
