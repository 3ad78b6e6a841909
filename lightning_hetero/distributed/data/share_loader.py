"""Give a DataLoader another batch sampler, and track which batch it has just yielded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.distributed.data.changed_loader import changed_loader
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler
from lightning_hetero.distributed.data.skipping import is_stateful

__all__ = ["share_loader"]


def share_loader(
    loader: DataLoader[Any],
    shares: ShareBatchSampler,
    before_fetch: Callable[[], None],
    after_fetch: Callable[[BatchSlice], None],
    batch_sampler: Sampler[list[int]] | Iterable[list[int]] | None = None,
) -> DataLoader[Any]:
    """Return a copy of ``loader`` that draws its batches from ``shares``; see :func:`changed_loader`.

    Args:
        loader: A DataLoader with automatic batching.
        shares: The sampler that decides which samples make a batch.
        before_fetch: Function that is called when a batch is requested.
        after_fetch: Function that is called before each batch is yielded, with the batch's slice.
        batch_sampler: A wrapper around ``shares`` over which the loader iterates instead; None for ``shares`` itself.

    Returns:
        The copy.
    """
    return changed_loader(
        loader,
        _StatefulShareLoader if is_stateful(loader) else _ShareLoader,
        batch_sampler=shares if batch_sampler is None else batch_sampler,
        in_order=True,  # batches that overtake each other could not be paired with their slices
        _shares=shares,
        _before_fetch=before_fetch,
        _after_fetch=after_fetch,
    )


class _ShareLoader(DataLoader[Any]):
    _shares: ShareBatchSampler
    _before_fetch: Callable[[], None]
    _after_fetch: Callable[[BatchSlice], None]

    def __iter__(self) -> Any:
        return _ObservedIterator(super().__iter__, self._shares, self._before_fetch, self._after_fetch)


class _StatefulShareLoader(_ShareLoader):
    """A loader that can save its position, but leaves that to ``shares``, which knows it for any number of ranks."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state: the loader begins where ``shares`` begins."""


class _ObservedIterator:
    """Pairs each batch with its slice; loaders yield batches in the order in which the sampler drew them.

    The loader begins to read when the first batch is requested. A training loop may call ``iter()`` long before that,
    when neither the epoch is known nor the step at which a resumed run continues.
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
