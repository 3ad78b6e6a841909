"""The global batches of an epoch, the same on every rank, from which each rank takes its share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

from lightning_hetero.balance.batch.blocks import Blocks
from lightning_hetero.distributed.collectives import BroadcastOrder, SizedOrder

__all__ = ["CutBatches", "GlobalBatches", "ListedBatches"]


class GlobalBatches(Protocol):
    """An epoch as a sequence of global batches.

    Attributes:
        order: what they are made from; has ``set_epoch`` where the epochs differ.
        size: samples of a whole global batch.
    """

    order: Any
    size: int

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def size_at(self, block: int) -> int:
        """Return the size of one."""
        ...

    def since(self, block: int) -> Iterator[list[int]]:
        """Begin an epoch at global batch number ``block``."""
        ...


class CutBatches:
    """Consecutive pieces of an order of single samples.

    Args:
        order: the order of the whole epoch, the same on every rank; has a length.
        size: samples in a global batch.
        drop_last: leave out a last one that is not full.
        least: samples that the last one has at least, where the one before it can spare them.
    """

    def __init__(self, order: SizedOrder, size: int, *, drop_last: bool, least: int = 1) -> None:
        self.order = order
        self.size = size
        self._drop_last = drop_last
        self._least = least

    @property
    def _blocks(self) -> Blocks:
        # not kept: the length of an order may change between epochs
        return Blocks(len(self.order), self.size, self._drop_last, self._least)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._blocks)

    def size_at(self, block: int) -> int:
        """Return the size of one."""
        return self._blocks.size_at(block)

    def since(self, block: int) -> Iterator[list[int]]:
        """Begin an epoch at global batch number ``block``."""
        blocks = self._blocks
        entries = islice(self.order, sum(blocks.size_at(b) for b in range(min(block, len(blocks)))), None)
        for number in range(block, len(blocks)):
            yield list(islice(entries, blocks.size_at(number)))


class ListedBatches:
    """The batches of a batch sampler, or several of them joined.

    Args:
        batches: the lists of indices, the same on every rank.
        size: samples of a whole global batch.
        join: how many consecutive batches make one global batch.
    """

    def __init__(self, batches: BroadcastOrder[list[int]], size: int, join: int = 1) -> None:
        self.order = batches
        self.size = size
        self._join = join

    def __len__(self) -> int:
        """Return how many there are."""
        return math.ceil(len(self.order) / self._join)

    def size_at(self, block: int) -> int:
        """Return the size of one."""
        return len(self._joined(block))

    def since(self, block: int) -> Iterator[list[int]]:
        """Begin an epoch at global batch number ``block``."""
        return (self._joined(number) for number in range(block, len(self)))

    def _joined(self, block: int) -> list[int]:
        parts = self.order.entries[block * self._join : (block + 1) * self._join]
        return [index for part in parts for index in part]
