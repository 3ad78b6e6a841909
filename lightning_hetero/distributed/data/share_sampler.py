"""A batch sampler that gives a rank its share of every global batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Sampler

from lightning_hetero.balance.batch.blocks import Cursor
from lightning_hetero.balance.batch.sharding import positions_of_rank
from lightning_hetero.balance.types import BatchPlan, BatchSlice
from lightning_hetero.distributed.data.global_batches import GlobalBatches

__all__ = ["ShareBatchSampler"]


class ShareBatchSampler(Sampler[list[int]]):
    """Yields one rank's part of each global batch.

    Every rank iterates over the same global batches, so the ranks need not speak to each other: which plan holds at
    which step is all that they have to agree on.

    Args:
        batches: the global batches of the epoch, the same on every rank.
        batch_size: samples a rank under equal shares, as the user's loader had it, if it did.
        drop_last: as the user's loader had it.
        rank: the rank whose part is yielded.
        plan_of: the plan of a global batch, from where it stands and its size. It is asked when the batch is drawn,
            which with workers is ahead of its step.
        begin: where to begin. It is asked at each ``iter()``.
        original: the batch sampler that this one takes the place of.
        stand_in: where a global batch has no sample for the rank, yield samples of others, so that the rank takes part
            in the step (the slice says 0 samples); otherwise the rank has one batch less.

    Attributes:
        slices: what the latest iteration has drawn and nobody has taken yet, in the order of batches.
        fetched_through: latest step drawn so far; -1 before the first.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        *,
        batch_size: int | None,
        drop_last: bool,
        rank: int,
        plan_of: Callable[[Cursor, int], BatchPlan],
        begin: Callable[[], Cursor],
        original: Any = None,
        stand_in: bool = True,
    ) -> None:
        # under these names Lightning finds the sampler whose epoch it sets, and users find what they passed
        self.sampler = batches.order
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.batches = batches
        self.original = original
        self.rank = rank
        self.slices: deque[BatchSlice] = deque()
        self.fetched_through = -1
        self._plan_of = plan_of
        self._begin = begin
        self._stand_in = stand_in

    def __len__(self) -> int:
        """Return the number of steps, equal on all ranks; without ``stand_in`` a rank may have fewer batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        # not a generator itself: an epoch begins where it stands at the moment at which it is begun
        self.slices = deque()
        return self._draw(self._begin(), self.slices)

    def _draw(self, cursor: Cursor, slices: deque[BatchSlice]) -> Iterator[list[int]]:
        for block in self.batches.since(cursor.block):
            plan = self._plan_of(cursor, len(block))
            batch = [block[position] for position in positions_of_rank(plan, self.rank)]
            # several iterations may be alive: a callback that looks at a batch begins one of its own
            self.fetched_through = max(self.fetched_through, cursor.step)
            if batch or self._stand_in:
                slices.append(BatchSlice(cursor.step, self.rank, plan))
                # two, because batch normalisation refuses to train on one
                yield batch or (block * 2)[:2]
            cursor = cursor.moved(1)
