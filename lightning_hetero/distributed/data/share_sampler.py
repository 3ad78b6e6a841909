"""A batch sampler that gives a rank its part of every global batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Sampler

from lightning_hetero.balance.batch.blocks import Cursor
from lightning_hetero.balance.batch.sharding import positions_of_rank
from lightning_hetero.balance.types import BatchPlan, BatchSlice
from lightning_hetero.distributed.data.global_batches import GlobalBatches

__all__ = ["ShareBatchSampler"]


class ShareBatchSampler(Sampler[list[int]]):
    """Yields one rank's part of each global batch.

    Every rank iterates over the same global batches, so the ranks need not communicate. They only have to agree on
    which plan holds at which step.

    Args:
        batches: Global batches of the epoch, the same on every rank.
        batch_size: Number of samples per rank under equal shares, as in the user's loader; None if it has none.
        drop_last: Whether to drop a ragged last batch, as in the user's loader.
        rank: Rank whose part is yielded.
        plan_of: Function that returns the plan of a global batch, given its position and size. It is called when the
            batch is drawn, which with workers is ahead of its step.
        begin: Function that returns the position at which to begin. It is called at each ``iter()``.
        original: The batch sampler that this one replaces.
        stand_in: Whether to yield samples of other ranks if a global batch has none for this rank, so that the rank
            takes part in the step (its slice has 0 samples). Otherwise the rank has one batch less.
        completion: Function that returns how many samples of the epoch's beginning complete a global batch, given its
            step and size; None to complete none.

    Attributes:
        slices: Slices that the latest iteration has drawn and nobody has taken yet, in the order of batches.
        fetched_through: Latest step drawn so far; -1 before the first.
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
        completion: Callable[[int, int], int] | None = None,
    ) -> None:
        # Lightning looks for the sampler whose epoch it sets under these names, and users for what they passed.
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
        self._completion = completion

    def __getattr__(self, name: str) -> Any:
        # users call methods of the batch sampler that they have passed, for example to set its epoch
        if name.startswith("_") or name == "original" or self.original is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.original, name)

    def begin_epoch(self) -> None:
        """Draw the order of a new epoch if that is still to be done; every rank must call this at the same point."""
        draw = getattr(self.batches.order, "draw", None)
        if callable(draw):
            draw()

    def __len__(self) -> int:
        """Return the number of steps, the same on all ranks; without ``stand_in`` a rank may have fewer batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        # Not a generator itself: the position is read when the iterator is created, not at its first item.
        self.slices = deque()
        return self._draw(self._begin(), self.slices)

    def _draw(self, cursor: Cursor, slices: deque[BatchSlice]) -> Iterator[list[int]]:
        for block in self.batches.since(cursor.block):
            if self._completion is not None and (lacking := self._completion(cursor.step, len(block))):
                block = [*block, *islice(self.batches.order, lacking)]  # noqa: PLW2901
            plan = self._plan_of(cursor, len(block))
            batch = [block[position] for position in positions_of_rank(plan, self.rank)]
            # Several iterators may be alive: a callback that looks at a batch creates one of its own.
            self.fetched_through = max(self.fetched_through, cursor.step)
            if batch or self._stand_in:
                slices.append(BatchSlice(cursor.step, self.rank, plan))
                # Two samples, because batch normalisation refuses to train on one.
                yield batch or (block * 2)[:2]
            cursor = cursor.moved(1)
