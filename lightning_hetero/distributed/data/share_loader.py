"""Give a DataLoader another batch sampler, and track which batch it has just yielded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.distributed.data.changed_loader import changed_loader, follow_original
from lightning_hetero.distributed.data.pairing import Drawn, Note, NotedLoader, iterates_itself
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler
from lightning_hetero.distributed.data.skipping import is_stateful

__all__ = ["share_loader"]


def share_loader(
    loader: DataLoader[Any],
    shares: ShareBatchSampler,
    before_fetch: Callable[[], None],
    after_fetch: Callable[[BatchSlice], None],
    batch_sampler: Sampler[list[int]] | Iterable[list[int]] | None = None,
    called_by_loop: Callable[[], bool] | None = None,
) -> DataLoader[Any]:
    """Return a copy of ``loader`` that draws its batches from ``shares``; see :func:`changed_loader`.

    Args:
        loader: A DataLoader with automatic batching.
        shares: The sampler that decides which samples make a batch.
        before_fetch: Function that is called when a batch is requested.
        after_fetch: Function that is called before each batch is yielded, with the batch's slice.
        batch_sampler: A wrapper around ``shares`` over which the loader iterates instead; None for ``shares`` itself.
        called_by_loop: Function that tells the calling ``__iter__`` whether a training loop has called it, which all
            ranks do at the same point. Then the ranks agree on a new epoch's order when the first batch is requested.

    Returns:
        The copy.
    """
    return changed_loader(
        loader,
        _StatefulShareLoader if is_stateful(loader) else _ShareLoader,
        _NotedShares,
        batch_sampler=shares if batch_sampler is None else batch_sampler,
        in_order=True,  # batches that overtake each other could not be paired with their slices
        _shares=shares,
        _before_fetch=before_fetch,
        _after_fetch=after_fetch,
        _called_by_loop=called_by_loop or bool,  # by default no; a lambda could not be pickled
        _compares=iterates_itself(loader),
    )


class _NotedShares(NotedLoader):
    """Notes the slice of each batch that is drawn."""

    _shares: ShareBatchSampler
    _in_loop = False

    def _begin(self) -> None:
        if self._in_loop:
            self._shares.begin_epoch()

    def _noting(self) -> Note:
        slices = self._shares.slices  # those of the iteration that has just begun
        return lambda batch: (slices.popleft(), batch)


class _ShareLoader(DataLoader[Any]):
    _shares: ShareBatchSampler
    _before_fetch: Callable[[], None]
    _after_fetch: Callable[[BatchSlice], None]
    _called_by_loop: Callable[[], bool]
    _drawn: Drawn | None

    def __iter__(self) -> Any:
        return _ObservedIterator(self, super().__iter__, in_loop=self._called_by_loop())


class _StatefulShareLoader(_ShareLoader):
    """A loader that can save its position, but leaves that to ``shares``, which knows it for any number of ranks."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state: the loader begins where ``shares`` begins."""


class _ObservedIterator:
    """Pairs each batch with its slice.

    The loader begins to read when the first batch is requested. A training loop may call ``iter()`` long before that,
    when neither the epoch is known nor the step at which a resumed run continues.
    """

    def __init__(self, loader: _ShareLoader, start: Callable[[], Iterator[Any]], *, in_loop: bool) -> None:
        self._loader = loader
        self._start = start
        self._in_loop = in_loop
        self._batches: Iterator[Any] | None = None
        self._drawn: Drawn | None = None

    def __iter__(self) -> _ObservedIterator:
        return self

    def __next__(self) -> Any:
        loader = self._loader
        loader._before_fetch()
        if self._batches is None:
            follow_original(loader)
            vars(loader).update(_drawn=None, _in_loop=self._in_loop)
            self._batches = iter(self._start())
        try:
            batch = next(self._batches)
        except StopIteration:
            self._checked(lambda drawn: drawn.end())
            raise
        loader._after_fetch(self._checked(lambda drawn: drawn.take(batch)))
        return batch

    def _checked(self, check: Callable[[Drawn], Any]) -> Any:
        if self._drawn is None:  # a generator begins to draw only when it is asked for its first batch
            self._drawn = self._loader._drawn or Drawn(type(self._loader).__name__, compares=True)
        return check(self._drawn)
