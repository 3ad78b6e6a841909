"""Make the global batches of an epoch, the same on every rank, from which each rank takes its share."""

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
        order: Order that the global batches are made from; has ``set_epoch`` if epochs differ.
        size: Number of samples of a full global batch.
    """

    order: Any
    size: int

    def __len__(self) -> int:
        """Return the number of global batches."""
        ...

    def size_at(self, block: int) -> int:
        """Return the size of global batch number ``block``."""
        ...

    def since(self, block: int) -> Iterator[list[int]]:
        """Iterate over the epoch from global batch number ``block`` on."""
        ...


class CutBatches:
    """Global batches that are consecutive pieces of an order of single samples.

    Args:
        order: Order of the whole epoch, the same on every rank; has a length.
        size: Number of samples of a full global batch.
        drop_last: Whether to drop a ragged last batch.
        least: Number of samples that the last batch has at least, if the one before it can spare them.
    """

    def __init__(self, order: SizedOrder, size: int, *, drop_last: bool, least: int = 1) -> None:
        self.order = order
        self.size = size
        self._drop_last = drop_last
        self._least = least

    @property
    def _blocks(self) -> Blocks:
        # Not cached: the length of an order may change between epochs.
        return Blocks(len(self.order), self.size, self._drop_last, self._least)

    def __len__(self) -> int:
        """Return the number of global batches."""
        return len(self._blocks)

    def size_at(self, block: int) -> int:
        """Return the size of global batch number ``block``."""
        return self._blocks.size_at(block)

    def since(self, block: int) -> Iterator[list[int]]:
        """Iterate over the epoch from global batch number ``block`` on."""
        blocks = self._blocks
        entries = islice(self.order, sum(blocks.size_at(b) for b in range(min(block, len(blocks)))), None)
        for number in range(block, len(blocks)):
            yield list(islice(entries, blocks.size_at(number)))


class ListedBatches:
    """Global batches that are the batches of a batch sampler, or several of these joined.

    Args:
        batches: Lists of indices, the same on every rank.
        size: Number of samples of a full global batch.
        join: Number of consecutive batches that make one global batch.
    """

    def __init__(self, batches: BroadcastOrder[list[int]], size: int, join: int = 1) -> None:
        self.order = batches
        self.size = size
        self._join = join

    def __len__(self) -> int:
        """Return the number of global batches."""
        return math.ceil(len(self.order) / self._join)

    def size_at(self, block: int) -> int:
        """Return the size of global batch number ``block``."""
        return len(self._joined(block))

    def since(self, block: int) -> Iterator[list[int]]:
        """Iterate over the epoch from global batch number ``block`` on."""
        return (self._joined(number) for number in range(block, len(self)))

    def _joined(self, block: int) -> list[int]:
        parts = self.order.entries[block * self._join : (block + 1) * self._join]
        return [index for part in parts for index in part]
