"""Give a DataLoader another batch sampler, and know which batch it has just handed out."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.distributed.share_sampler import ShareBatchSampler

__all__ = ["share_loader"]


def share_loader(
    loader: DataLoader[Any],
    shares: ShareBatchSampler,
    before_fetch: Callable[[], None],
    after_fetch: Callable[[BatchSlice], None],
    batch_sampler: Sampler[list[int]] | Iterable[list[int]] | None = None,
) -> DataLoader[Any]:
    """Return a copy of ``loader`` that draws its batches from ``shares``.

    The copy is of a subclass of the loader's own class, so whatever a user's subclass does stays; dataset, workers,
    collate function, generator and all other settings are those of the original, which is left as it was.

    Args:
        loader: a loader with automatic batching.
        shares: what decides which samples make a batch.
        before_fetch: called when a batch is asked for.
        after_fetch: called with its slice before a batch is handed out.
        batch_sampler: what the loader shall iterate instead of ``shares``; a wrapper around it.

    Returns:
        The copy.
    """
    shared = copy.copy(loader)
    cls = type(loader)
    if not issubclass(cls, _ShareLoader):
        object.__setattr__(shared, "__class__", type(cls.__name__, (_ShareLoader, cls), {"__module__": cls.__module__}))
    # DataLoader refuses to have this attribute set, but only in its own `__setattr__`: it reads the attribute anew
    # at each `iter()`. Constructing a second loader instead would need arguments that a subclass may not keep.
    object.__setattr__(shared, "batch_sampler", shares if batch_sampler is None else batch_sampler)
    # batches that overtake each other could not be paired with their slices
    object.__setattr__(shared, "in_order", True)
    object.__setattr__(shared, "_iterator", None)  # persistent workers of the original stay with it
    object.__setattr__(shared, "_shares", shares)
    object.__setattr__(shared, "_before_fetch", before_fetch)
    object.__setattr__(shared, "_after_fetch", after_fetch)
    return shared


class _ShareLoader(DataLoader[Any]):
    _shares: ShareBatchSampler
    _before_fetch: Callable[[], None]
    _after_fetch: Callable[[BatchSlice], None]

    def __iter__(self) -> Any:
        return _ObservedIterator(super().__iter__, self._shares, self._before_fetch, self._after_fetch)


class _ObservedIterator:
    """Pairs each batch with its slice; loaders hand out batches in the order in which the sampler drew them.

    The loader begins to read when the first batch is asked for. A training loop may call ``iter()`` long before, when
    neither the epoch nor the step at which a resumed run goes on is known.
    """

    def __init__(
        self,
        start: Callable[[], Iterator[Any]],
        shares: ShareBatchSampler,
        before_fetch: Callable[[], None],
        after_fetch: Callable[[BatchSlice], None],
    ) -> None:
        self._start = start
        self._shares = shares
        self._before_fetch = before_fetch
        self._after_fetch = after_fetch
        self._batches: Iterator[Any] | None = None
        self._slices: deque[BatchSlice] = deque()

    def __iter__(self) -> _ObservedIterator:
        return self

    def __next__(self) -> Any:
        self._before_fetch()
        if self._batches is None:
            self._batches = self._start()
            self._slices = self._shares.slices
        batch = next(self._batches)
        self._after_fetch(self._slices.popleft())
        return batch
