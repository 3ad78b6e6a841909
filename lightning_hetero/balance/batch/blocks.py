"""Cut an epoch into global batches, and tell which of them form a step together.

A *block* is one global batch, given as positions in the epoch's order.  If a step takes a batch from each of several
loaders, a single weight for its loss is exact only if every rank holds the same fraction of each batch.  Such batches
are therefore divided together, in units that divide all their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_hetero.balance.batch.sharding import plan_for_block
from lightning_hetero.balance.types import BatchLimits, BatchPlan, BatchSlice
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

_NO_LIMITS = BatchLimits()


@dataclass(frozen=True)
class Blocks:
    """The sizes of an epoch's global batches.

    Attributes:
        entries: Length of the epoch's order.
        size: Number of entries in a global batch.
        drop_last: Whether a ragged last global batch is left out.
        least: Fewest entries of the last global batch. The batch before it gives some up, if it can keep as many
            itself.
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
    """The position of a loader.

    Attributes:
        step: Training step that its next batch is for, counted from 0 over all epochs.
        position: Number of steps in this epoch before that one.
        block: Index of the batch among the loader's own global batches; it differs from ``position`` when a short
            loader is cycled.
    """

    step: int = 0
    position: int = 0
    block: int = 0

    def moved(self, batches: int) -> Cursor:
        """Return the position of the loader after ``batches`` more batches."""
        return Cursor(self.step + batches, self.position + batches, self.block + batches)


class Sized(Protocol):
    """The global batches of a loader."""

    @property
    def size(self) -> int:
        """Number of samples in a full global batch."""
        ...

    def __len__(self) -> int:
        """Return the number of global batches."""
        ...

    def size_at(self, block: int) -> int:
        """Return the size of global batch number ``block``."""
        ...


def block_in_step(position: int, blocks: int, mode: str) -> int | None:
    """Return which of its global batches a loader contributes to a step; None if it is exhausted.

    Args:
        position: Step, counted from the beginning of the epoch.
        blocks: Number of global batches of the loader.
        mode: Mode in which loaders are combined; with ``"max_size_cycle"`` an exhausted loader starts again.
    """
    if mode == "max_size_cycle" and blocks:
        return position % blocks
    return position if position < blocks else None


def blocks_before(position: int, blocks: int | None, mode: str) -> int:
    """Return how many global batches a loader has contributed, in its current cycle, to the steps before ``position``.

    Args:
        position: Step, counted from the beginning of the epoch.
        blocks: Number of global batches of the loader; None if it is unknown and the loader is not exhausted.
        mode: Mode in which loaders are combined.
    """
    if blocks is None:
        return position
    block = block_in_step(position, blocks, mode)
    return blocks if block is None else block


def uneven_steps(loaders: Sequence[Sized], mode: str) -> list[tuple[int, ...]]:
    """Return the sizes that are divided together in steps to which some loader contributes a ragged batch.

    Args:
        loaders: Global batches of each loader.
        mode: Mode in which they are combined: ``"max_size_cycle"``, ``"max_size"`` or ``"min_size"``.

    Returns:
        For each kind of such a step, the sizes of the batches from the loaders that are not exhausted.
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
    """Return the largest number of equal parts into which global batches of all these sizes can be divided."""
    return math.gcd(*sizes)


def divide_together(plan: BatchPlan, sizes: Sequence[int], limits: BatchLimits = _NO_LIMITS) -> list[BatchPlan]:
    """Divide global batches of several sizes so that every rank has the same fraction of each.

    The fractions are multiples of 1 / u, where u is the greatest common divisor of the sizes, so they follow ``plan``
    only as closely as u allows: sizes without a common divisor go to one rank entirely.

    Args:
        plan: Plan whose proportions are followed; its own global batch may have any size.
        sizes: Number of samples in each global batch, at least 1.
        limits: Limits of the ranks: ``max_samples`` for the samples of all loaders together, ``batch_multiple`` for
            those of each.

    Returns:
        The plan of each global batch, in the order of ``sizes``.

    Raises:
        InfeasiblePlanError: The fractions that are possible exceed the ranks' limits.

    Example:
        >>> [part.samples for part in divide_together(BatchPlan((2, 6)), (8, 12))]
        [(2, 6), (3, 9)]
        >>> [part.samples for part in divide_together(BatchPlan((2, 6)), (8, 5))]
        [(8, 0), (5, 0)]
    """
    units = common_unit(sizes)
    factors = [size // units for size in sizes]
    caps = limits.max_samples
    in_units = BatchLimits(
        None if caps is None else tuple(cap // sum(factors) for cap in caps),
        math.lcm(*(limits.batch_multiple // math.gcd(limits.batch_multiple, factor) for factor in factors)),
    )
    division = plan_for_block(plan, units, in_units, -(-2 // min(factors)))
    return [BatchPlan(tuple(n * factor for n in division.samples)) for factor in factors]


def merge_slices(slices: Sequence[BatchSlice]) -> BatchSlice:
    """Return the rank's part of a step that takes a global batch from each of several loaders, in common units.

    Raises:
        UnsupportedFeatureError: The ranks hold different fractions of the global batches, so no single weight for the
            loss is exact. Every rank raises, because a slice knows the parts of all ranks.
    """
    first = slices[0]
    if len(slices) == 1:
        return first
    for other in slices[1:]:
        pairs = zip(first.plan.samples, other.plan.samples, strict=True)
        if any(a * other.global_samples != b * first.global_samples for a, b in pairs):
            raise UnsupportedFeatureError(
                f"`hetero_ddp` weights the loss of a step once, so every rank must hold the same fraction of each"
                f" loader's batch, got {[list(part.plan.samples) for part in slices]} samples on the ranks in step"
                f" {first.step}. Give the loaders of all ranks equal numbers of samples, or combine them into one."
            )
    unit = first.global_samples // common_unit([part.global_samples for part in slices])
    return BatchSlice(first.step, first.rank, BatchPlan(tuple(n // unit for n in first.plan.samples)))
