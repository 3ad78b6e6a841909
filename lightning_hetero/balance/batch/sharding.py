"""Assign the positions of a global batch to ranks.

A global batch is a block of consecutive entries of the epoch's order.  The ranks divide it among themselves, so its
samples are the same under every plan.  Positions are dealt out like cards: the i-th sample of rank r has its turn at
``i / n_r``, and the lower rank goes first if two turns coincide.  Under equal shares rank r gets r, r + W, r + 2W and
so on, as with ``torch.utils.data.DistributedSampler``, so every rank has exactly the mini-batches that it has under
plain DDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lightning_hetero.balance.batch.batch_solver import proportional_plan
from lightning_hetero.balance.types import BatchLimits, BatchPlan
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["plan_for_block", "positions_of_rank"]

_NO_LIMITS = BatchLimits()


@lru_cache(maxsize=1024)
def plan_for_block(
    plan: BatchPlan, block_size: int, limits: BatchLimits = _NO_LIMITS, min_samples: int = 2
) -> BatchPlan:
    """Divide a block of another size in the proportions of ``plan``.

    It divides ragged last batches, and evaluation batches of another size.  As many ranks as possible get samples, and
    each of them at least ``min_samples`` if that is possible.  Rank 0 is among them if ``plan`` gives it any, because
    what users log from rank 0 alone must come from real data; after it, those with the largest shares come first.  A
    rank without samples in ``plan`` gets none.

    Args:
        plan: Plan of a full global batch.
        block_size: Number of samples to divide, at least 1.
        limits: Limits of the ranks, as for the full global batch.
        min_samples: Fewest samples of a rank that has any. Batch normalisation refuses to train on one.

    Returns:
        A plan of ``block_size`` samples; ``plan`` itself if the sizes agree.

    Raises:
        InfeasiblePlanError: The block is larger than the ranks' limits together.

    Example:
        >>> plan_for_block(BatchPlan((8, 16)), 9).samples
        (3, 6)
        >>> plan_for_block(BatchPlan((2, 6)), 6).samples, plan_for_block(BatchPlan((2, 6)), 3).samples
        ((2, 4), (3, 0))
        >>> plan_for_block(BatchPlan((2, 6)), 7, BatchLimits(batch_multiple=2)).samples
        (2, 5)
        >>> plan_for_block(BatchPlan((8, 16, 16)), 2, min_samples=1).samples
        (1, 1, 0)
    """
    if block_size == plan.global_batch_size:
        return plan
    present = [rank for rank, share in enumerate(plan.samples) if share]
    caps = limits.max_samples or (block_size,) * plan.world_size
    by_share = sorted(present, key=lambda rank: (rank != 0, -plan.samples[rank], rank))
    by_limit = sorted(present, key=lambda rank: (-caps[rank], rank))
    for least in (min_samples, 1) if min_samples > 1 else (min_samples,):
        for order in (by_share, by_limit):  # with low limits, only the ranks with the highest may be able
            most_ranks = block_size // max(min(least, *(caps[rank] for rank in present)), 1)
            for count in range(min(len(order), most_ranks), 0, -1):
                division = _divided(plan, block_size, limits, least, order[:count])
                if division is not None:
                    return division
    # says which limits are too low
    most = tuple(cap if share else 0 for cap, share in zip(caps, plan.samples, strict=True))
    return proportional_plan(plan.shares, block_size, BatchLimits(most, limits.batch_multiple))


def _divided(plan: BatchPlan, size: int, limits: BatchLimits, least: int, ranks: Sequence[int]) -> BatchPlan | None:
    """Divide ``size`` samples among ``ranks``, at least ``least`` for each; None if that is impossible."""
    caps = limits.max_samples or (size,) * plan.world_size
    most = [0] * plan.world_size
    for rank in ranks:
        most[rank] = min(caps[rank], size)
    # a rank whose limit is lower still takes part
    fewest = [min(least, cap) for cap in most]
    if not all(most[rank] for rank in ranks):
        return None
    found = _solved(plan, size, most, limits.batch_multiple, fewest)
    remainder = size % limits.batch_multiple
    if found is not None or remainder == 0:
        return found
    # too few whole multiples for all: one rank has only the remainder, preferably the one with the smallest share
    for carrier in reversed(ranks):
        if not fewest[carrier] <= remainder <= most[carrier]:
            continue
        division = [remainder if rank == carrier else 0 for rank in range(plan.world_size)]
        if len(ranks) == 1:
            return BatchPlan(tuple(division)) if size == remainder else None
        others = [0 if rank == carrier else cap for rank, cap in enumerate(most)]
        fewest_others = [0 if rank == carrier else n for rank, n in enumerate(fewest)]
        whole = (
            _solved(plan, size - remainder, others, limits.batch_multiple, fewest_others) if size > remainder else None
        )
        if whole is not None:
            return BatchPlan(tuple(a + b for a, b in zip(whole.samples, division, strict=True)))
    return None


def _solved(plan: BatchPlan, size: int, most: Sequence[int], multiple: int, fewest: Sequence[int]) -> BatchPlan | None:
    try:
        return proportional_plan(plan.shares, size, BatchLimits(tuple(most), multiple), min_samples=fewest)
    except InfeasiblePlanError:
        return None


@lru_cache(maxsize=1024)
def positions_of_rank(plan: BatchPlan, rank: int) -> tuple[int, ...]:
    """Return the positions of a global batch that ``rank`` owns under ``plan``.

    Args:
        plan: Plan of the block, which has ``plan.global_batch_size`` samples.
        rank: Rank whose positions are returned.

    Returns:
        ``plan.samples[rank]`` positions in ascending order. Each position belongs to exactly one rank.

    Example:
        >>> [positions_of_rank(BatchPlan((2, 4)), rank) for rank in (0, 1)]
        [(0, 3), (1, 2, 4, 5)]
    """
    turns = np.concatenate([np.arange(n) / n for n in plan.samples if n])
    owners = np.repeat(np.arange(plan.world_size), plan.samples)
    order = np.lexsort((owners, turns))
    return tuple(int(position) for position in np.flatnonzero(owners[order] == rank))
