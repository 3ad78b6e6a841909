"""A batch sampler that gives a rank its share of every global batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from torch.utils.data import Sampler

from lightning_hetero.balance.sharding import plan_for_block, positions_of_rank
from lightning_hetero.balance.types import BatchPlan, BatchSlice
from lightning_hetero.distributed.agree import SizedOrder

__all__ = ["ShareBatchSampler"]


class ShareBatchSampler(Sampler[list[int]]):
    """Cuts the epoch's order into global batches and yields one rank's part of each.

    Every rank iterates over the same order, that of ``sampler``, so the ranks need not speak to each other: which
    plan holds at which step is all that they have to agree on.

    Args:
        sampler: the order of the whole epoch, the same on every rank; has a length.
        batch_size: samples a rank under equal shares, as the user's loader had it.
        global_batch_size: samples of all ranks in one step.
        drop_last: leave out a last global batch that is not full.
        rank: the rank whose part is yielded.
        plan_at: the plan of a step. It is asked when a batch is drawn, which with workers is ahead of its step.
        first_step: the step of an epoch's first batch. It is asked at each ``iter()``.
        stand_in: where a short last batch has no sample for the rank, yield samples of others, so that the rank
            takes part in the step (the slice says 0 samples); otherwise the rank has one batch less.

    Attributes:
        slices: what the latest iteration has drawn and nobody has taken yet, in the order of batches.
        fetched_through: latest step drawn so far; -1 before the first.
    """

    def __init__(
        self,
        sampler: SizedOrder,
        *,
        batch_size: int,
        global_batch_size: int,
        drop_last: bool,
        rank: int,
        plan_at: Callable[[int], BatchPlan],
        first_step: Callable[[], int],
        stand_in: bool = True,
    ) -> None:
        # under these names Lightning finds the sampler whose epoch it sets, and users find what they passed
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.slices: deque[BatchSlice] = deque()
        self.fetched_through = -1
        self._plan_at = plan_at
        self._first_step = first_step
        self._stand_in = stand_in

    def __len__(self) -> int:
        """Return the number of batches, equal on all ranks unless ``stand_in`` is False."""
        whole, rest = divmod(len(self.sampler), self.global_batch_size)
        if not rest or self.drop_last:
            return whole
        if self._stand_in:
            return whole + 1
        plan = self._plan_at(self._first_step() + whole)
        return whole + (plan_for_block(plan, rest).samples[self.rank] > 0)

    def __iter__(self) -> Iterator[list[int]]:
        # not a generator itself: an epoch's first step is that of the moment at which the epoch is begun
        self.slices = deque()
        return self._draw(self.sampler, self.slices, self._first_step())

    def _draw(self, order: Iterable[int], slices: deque[BatchSlice], step: int) -> Iterator[list[int]]:
        entries = iter(order)
        while block := list(islice(entries, self.global_batch_size)):
            if len(block) < self.global_batch_size and self.drop_last:
                return
            plan = plan_for_block(self._plan_at(step), len(block))
            batch = [block[position] for position in positions_of_rank(plan, self.rank)]
            if not batch and not self._stand_in:
                return
            slices.append(BatchSlice(step, len(batch), len(block), plan.world_size))
            # several iterations may be alive: a callback that looks at a batch begins one of its own
            self.fetched_through = max(self.fetched_through, step)
            # two, because batch normalisation refuses to train on one
            yield batch or (block * 2)[:2]
            step += 1
