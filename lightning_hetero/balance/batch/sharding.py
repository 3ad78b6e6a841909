"""Assign the positions of a global batch to ranks.

A global batch is a block of consecutive entries of the epoch's order.  The ranks divide it among themselves, so its
samples are the same under every plan.  Positions are dealt out like cards: the i-th sample of rank r has its turn at
``i / n_r``, and the lower rank goes first if two turns coincide.  Under equal shares rank r gets r, r + W, r + 2W and
so on, as with ``torch.utils.data.DistributedSampler``, so every rank has exactly the mini-batches that it has under
plain DDP.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lightning_hetero.balance.batch.batch_solver import proportional_plan
from lightning_hetero.balance.types import BatchLimits, BatchPlan

__all__ = ["plan_for_block", "positions_of_rank"]


@lru_cache(maxsize=1024)
def plan_for_block(plan: BatchPlan, block_size: int) -> BatchPlan:
    """Divide a block of another size in the proportions of ``plan``.

    It divides ragged last batches, and evaluation batches of another size.  Rank 0 always has a sample if ``plan``
    gives it any, because what users log from rank 0 alone must come from real data.  So does every other rank if there
    are enough samples.

    Args:
        plan: Plan of a full global batch.
        block_size: Number of samples to divide, at least 1.

    Returns:
        A plan of ``block_size`` samples; ``plan`` itself if the sizes agree.

    Example:
        >>> plan_for_block(BatchPlan((8, 16)), 9).samples
        (3, 6)
        >>> plan_for_block(BatchPlan((8, 16, 16)), 2).samples
        (1, 1, 0)
    """
    if block_size == plan.global_batch_size:
        return plan
    enough = block_size >= plan.world_size
    least = [1 if enough or rank == 0 else 0 for rank in range(plan.world_size)]
    # a rank without samples in the full batch gets none here either
    least = [min(n, share) for n, share in zip(least, plan.samples, strict=True)]
    if sum(least) == 0:
        least[next(rank for rank, share in enumerate(plan.samples) if share)] = 1
    most = tuple(block_size if share else 0 for share in plan.samples)
    shares = [max(share, 1e-9) for share in plan.samples]
    return proportional_plan(shares, block_size, BatchLimits(max_samples=most), min_samples=least)


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
