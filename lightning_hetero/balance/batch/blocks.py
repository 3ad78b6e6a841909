"""How an epoch is cut into global batches, and which of them make a step together.

A *block* is one global batch as positions of the epoch's order.  Where a step takes a batch from each of several
loaders, one weight for its loss can only be exact if every rank holds the same fraction of each of them; therefore they
are divided together, in units that all their sizes are multiples of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_hetero.balance.batch.sharding import plan_for_block
from lightning_hetero.balance.types import BatchPlan, BatchSlice
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = [
    "Blocks",
    "Cursor",
    "block_in_step",
    "blocks_before",
    "common_unit",
    "divide_together",
    "merge_slices",
    "uneven_steps",
]


@dataclass(frozen=True)
class Blocks:
    """The sizes of an epoch's global batches.

    Attributes:
        entries: length of the epoch's order.
        size: entries in a global batch.
        drop_last: leave out a last global batch that is not full.
        least: entries that the last global batch has at least, where the one before it can give some up and keep as
            many itself.
    """

    entries: int
    size: int
    drop_last: bool = False
    least: int = 1

    def __len__(self) -> int:
        """Return the number of global batches."""
        return self.entries // self.size if self.drop_last else -(-self.entries // self.size)

    def size_at(self, block: int) -> int:
        """Return the size of global batch number ``block``."""
        rest = self.entries % self.size
        if self.drop_last or not rest or block < len(self) - 2:
            return self.size
        moved = max(self.least - rest, 0) if len(self) > 1 and self.size + rest >= 2 * self.least else 0
        return self.size - moved if block == len(self) - 2 else rest + moved


@dataclass(frozen=True)
class Cursor:
    """Where a loader stands.

    Attributes:
        step: training step that its next batch is for, counted from 0 over all epochs.
        position: steps of this epoch before that one.
        block: which of its own global batches that is; it differs from ``position`` where a short loader is cycled.
    """

    step: int = 0
    position: int = 0
    block: int = 0

    def moved(self, batches: int) -> Cursor:
        """Return where the loader stands that many batches later."""
        return Cursor(self.step + batches, self.position + batches, self.block + batches)


class Sized(Protocol):
    """A loader's global batches."""

    @property
    def size(self) -> int:
        """Samples of a whole one."""
        ...

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def size_at(self, block: int) -> int:
        """Return the size of one."""
        ...


def block_in_step(position: int, blocks: int, mode: str) -> int | None:
    """Return which of its global batches a loader gives to a step, or None where it is exhausted.

    Args:
        position: the step, counted from the beginning of the epoch.
        blocks: number of global batches of the loader.
        mode: how loaders are combined; in ``"max_size_cycle"`` one begins anew when it is exhausted.
    """
    if mode == "max_size_cycle" and blocks:
        return position % blocks
    return position if position < blocks else None


def blocks_before(position: int, blocks: int | None, mode: str) -> int:
    """Return how many of its global batches a loader has given, in its present pass, to the steps before ``position``.

    Args:
        position: the step, counted from the beginning of the epoch.
        blocks: number of global batches of the loader; None where it is not known, and the loader not exhausted.
        mode: how loaders are combined.
    """
    if blocks is None:
        return position
    block = block_in_step(position, blocks, mode)
    return blocks if block is None else block


def uneven_steps(loaders: Sequence[Sized], mode: str) -> list[tuple[int, ...]]:
    """Return the sizes that are divided together in steps to which some loader gives a last batch that is not full.

    Args:
        loaders: the global batches of each loader.
        mode: how they are combined: ``"max_size_cycle"``, ``"max_size"`` or ``"min_size"``.

    Returns:
        For each kind of such a step the sizes that loaders which are not exhausted give to it.
    """
    lengths = [len(loader) for loader in loaders]
    steps = min(lengths) if mode == "min_size" else max(lengths)
    found: set[tuple[int, ...]] = set()
    for loader, length in zip(loaders, lengths, strict=True):
        if length and loader.size_at(length - 1) != loader.size:
            for position in range(length - 1, steps, length if mode == "max_size_cycle" else max(steps, 1)):
                blocks = [(other, block_in_step(position, len(other), mode)) for other in loaders]
                found.add(tuple(other.size_at(block) for other, block in blocks if block is not None))
    return sorted(found)


def common_unit(sizes: Sequence[int]) -> int:
    """Return the number of equal parts into which global batches of all these sizes can be divided."""
    return math.gcd(*sizes)


def divide_together(plan: BatchPlan, sizes: Sequence[int]) -> list[BatchPlan]:
    """Divide global batches of several sizes such that every rank has the same fraction of each.

    The fractions are multiples of 1 / u, where u is the greatest common divisor of the sizes, so they follow ``plan``
    only as closely as u allows: sizes without a common divisor go to one rank as a whole.

    Args:
        plan: in which proportions; its own global batch may have any size.
        sizes: samples of each global batch, at least 1.

    Returns:
        The plan of each global batch, in the order of ``sizes``.

    Example:
        >>> [part.samples for part in divide_together(BatchPlan((2, 6)), (8, 12))]
        [(2, 6), (3, 9)]
        >>> [part.samples for part in divide_together(BatchPlan((2, 6)), (8, 5))]
        [(8, 0), (5, 0)]
    """
    units = common_unit(sizes)
    division = plan_for_block(plan, units)
    return [BatchPlan(tuple(n * (size // units) for n in division.samples)) for size in sizes]


def merge_slices(slices: Sequence[BatchSlice]) -> BatchSlice:
    """Return the rank's part of a step that takes a global batch from each of several loaders, in common units.

    Raises:
        UnsupportedFeatureError: the ranks hold different fractions of the global batches, so that no single weight for
            the loss is exact. Every rank raises, since a slice knows the parts of all.
    """
    first = slices[0]
    if len(slices) == 1:
        return first
    for other in slices[1:]:
        pairs = zip(first.plan.samples, other.plan.samples, strict=True)
        if any(a * other.global_samples != b * first.global_samples for a, b in pairs):
            raise UnsupportedFeatureError(
                f"`hetero_ddp` weights the loss of a step once, so every rank has to hold the same fraction of each"
                f" loader's batch, got {[list(part.plan.samples) for part in slices]} samples on the ranks in step"
                f" {first.step}. Give the loaders of all ranks equal numbers of samples, or combine them into one."
            )
    unit = first.global_samples // common_unit([part.global_samples for part in slices])
    return BatchSlice(first.step, first.rank, BatchPlan(tuple(n // unit for n in first.plan.samples)))
