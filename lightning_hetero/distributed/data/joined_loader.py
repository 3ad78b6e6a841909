"""Keep loaders that every rank fills by itself in step: all ranks stop together and know each other's batch sizes.

Such loaders yield what their rank's dataset or sampler gives them. Batch sizes differ, and one rank may have fewer
batches than another. Under plain DDP, a rank that has run out of batches leaves the others waiting for ever. Here the
ranks exchange the sizes of their next batches, in one small all-reduce per step. A rank that has run out yields a
stand-in, a copy of another rank's batch that counts 0 samples, until every rank has run out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_hetero.balance.batch.blocks import Cursor
from lightning_hetero.balance.types import BatchPlan, BatchSlice
from lightning_hetero.distributed.collectives import all_gather, all_gather_counts, broadcast_from, length_of
from lightning_hetero.distributed.data.changed_loader import changed_loader, follow_original
from lightning_hetero.distributed.data.pairing import Drawn, Note, NotedLoader, iterates_itself
from lightning_hetero.distributed.data.skipping import SkippingSampler, can_skip, is_stateful
from lightning_hetero.exceptions import RankFailedError, UnsupportedFeatureError

__all__ = ["JoinedLoader", "Joint", "join_loader"]

_EXHAUSTED = -1
_FAILED = -2


class Joint(NamedTuple):
    """How a loader is kept in step with the loaders of other ranks.

    Attributes:
        samples_in: Function that counts the samples of a batch; called if the loader does not make its batches from
            samples, or if its class does not yield them as it draws them.
        begin: Function that returns where to begin; ``block`` batches are skipped. It is called when the first batch is
            requested.
        after_fetch: Function that is called before each batch is yielded, with the batch's slice.
        called_by_loop: Function that tells the calling ``__iter__`` whether a training or evaluation loop has called
            it. Any other reader, such as a callback that looks at a batch, may run on one rank only: it iterates over
            the rank's own loader, without the other ranks.
    """

    samples_in: Callable[[Any], int]
    begin: Callable[[], Cursor]
    after_fetch: Callable[[BatchSlice], None]
    called_by_loop: Callable[[], bool]


def join_loader(loader: Any, joint: Joint) -> Any:
    """Return a loader of the same batches that is kept in step with the loaders of the other ranks.

    Every rank must call this at the same point.

    Args:
        loader: A DataLoader or any other iterable.
        joint: How the loaders are kept in step.

    Returns:
        A :class:`JoinedLoader`: a copy if ``loader`` is a DataLoader, otherwise a wrapper with the attributes of
        ``loader``. Its length is that of the longest loader of all ranks if every rank's loader has a length.
    """
    if isinstance(loader, _JoinedIterable):  # from an earlier fit
        loader = loader._loader
    lengths = all_gather(length_of(loader))
    longest = None if any(length is None for length in lengths) else max(length or 0 for length in lengths)
    own: dict[str, Any] = {"_joint": joint, "_longest": longest}
    if not isinstance(loader, DataLoader):
        return _JoinedIterable(loader, own)
    # a DataLoader makes batches from samples if it has a batch sampler or a batch size
    if loader.batch_sampler is not None or loader.batch_size is not None:
        own["collate_fn"] = _CountingCollate.of(loader.collate_fn)
    if not is_stateful(loader) and can_skip(loader):
        own["batch_sampler"] = SkippingSampler(loader.batch_sampler)
    own["_compares"] = iterates_itself(loader)
    joined = _StatefulJoinedDataLoader if is_stateful(loader) else _JoinedDataLoader
    return changed_loader(loader, joined, _NotedCounts, **own)


class JoinedLoader:
    """Base class of all joined loaders."""

    _joint: Joint
    _longest: int | None

    @property
    def has_length(self) -> bool:
        """Whether the number of batches is known before they are read."""
        return self._longest is not None

    def __len__(self) -> int:
        """Return the number of batches of the rank that has the most.

        Raises:
            TypeError: A rank's loader has no length.
        """
        if self._longest is None:
            raise TypeError("a rank's loader has no length")
        return self._longest

    def _iterate(self, start: Callable[[], Iterator[Any]], *, joined: bool) -> Iterator[Any]:
        return _JoinedIterator(start, self._joint, self) if joined else iter(start())

    def _skip(self, batches: int) -> int:
        """Begin the next iteration ``batches`` later; return how many batches are still to be read and discarded."""
        return batches

    def _before_read(self) -> None:
        """Prepare for the joined iteration to read a batch."""


class _NotedCounts(NotedLoader):
    """Notes the number of samples of each batch that is drawn."""

    def _noting(self) -> Note:
        return lambda item: (item.samples, item.batch) if isinstance(item, _Counted) else (None, item)


class _JoinedDataLoader(DataLoader[Any], JoinedLoader):
    __len__ = JoinedLoader.__len__

    def __iter__(self) -> Any:
        return self._iterate(super().__iter__, joined=self._joint.called_by_loop())

    def _skip(self, batches: int) -> int:
        if isinstance(self.batch_sampler, SkippingSampler):
            self.batch_sampler.skip = batches
            return 0
        return batches


class _StatefulJoinedDataLoader(_JoinedDataLoader):
    """A joined loader that saves its position and resumes by itself, like torchdata's ``StatefulDataLoader``.

    A training loop that does not know the number of batches reads one batch ahead. The position to save is the one
    before that batch.
    """

    _before_last: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] | None = self._before_last
        return super().state_dict() if state is None else state  # type: ignore[misc]

    def _before_read(self) -> None:
        if not self.has_length and self._iterator is not None:
            vars(self)["_before_last"] = super().state_dict()  # type: ignore[misc]

    def _skip(self, batches: int) -> int:  # noqa: ARG002
        return 0


class _JoinedIterable(JoinedLoader):
    """A joined loader around an iterable that is no DataLoader."""

    def __init__(self, loader: Iterable[Any], own: dict[str, Any]) -> None:
        self._loader = loader
        self.__dict__.update(own)

    def __iter__(self) -> Any:
        return self._iterate(lambda: iter(self._loader), joined=self._joint.called_by_loop())

    def _skip(self, batches: int) -> int:
        return 0 if is_stateful(self._loader) else batches  # it resumes by itself

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":  # looked up while this is being copied
            raise AttributeError(name)
        return getattr(self._loader, name)


class _JoinedIterator:
    """One iteration over a joined loader; it starts to read when the first batch is requested."""

    def __init__(self, start: Callable[[], Iterator[Any]], joint: Joint, loader: JoinedLoader) -> None:
        self._start = start
        self._joint = joint
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._drawn: Drawn | None = None
        self._counts_drawn = True
        self._ended = False
        self._cursor = Cursor()
        self._exhausted: set[int] = set()
        self._stand_in: Any = None

    def __iter__(self) -> _JoinedIterator:
        return self

    def __next__(self) -> Any:
        samples, batch, error = _EXHAUSTED, None, None
        try:
            if not self._ended:
                samples, batch = self._read()
        except StopIteration:
            self._ended = True  # some iterators wait for ever if they are asked again
        except Exception as raised:
            samples, error = _FAILED, raised
        counts = all_gather_counts(samples)
        if error is not None:
            raise error
        if _FAILED in counts:
            raise RankFailedError(
                f"The loader of rank {counts.index(_FAILED)} raised an error, which that rank reports. The others"
                f" cannot continue without its batches."
            )
        if all(count == _EXHAUSTED for count in counts):
            raise StopIteration
        batch = self._supplied(batch, counts)
        self._joint.after_fetch(BatchSlice(self._cursor.step, _rank(), _division(counts)))
        self._cursor = self._cursor.moved(1)
        return batch

    def _read(self) -> tuple[int, Any]:
        if self._batches is None:
            self._cursor = self._joint.begin()
            to_discard = self._loader._skip(self._cursor.block)
            if isinstance(self._loader, DataLoader):
                follow_original(self._loader)
            vars(self._loader)["_drawn"] = None
            self._batches = iter(self._start())
            for _ in range(to_discard):
                self._next()
        self._loader._before_read()
        return self._next()

    def _next(self) -> tuple[int, Any]:
        assert self._batches is not None
        batch = next(self._batches)
        if self._drawn is None and self._counts_drawn:
            self._drawn = vars(self._loader).get("_drawn")
        samples = None
        if self._drawn is not None:
            try:
                samples = self._drawn.take(batch, surely=True)
            except UnsupportedFeatureError:  # the user's class makes batches of its own
                self._drawn, self._counts_drawn = None, False
        return (self._joint.samples_in(batch) if samples is None else samples), batch

    def _supplied(self, batch: Any, counts: list[int]) -> Any:
        """Return the batch, or a stand-in if this rank has run out."""
        exhausted = {rank for rank, count in enumerate(counts) if count == _EXHAUSTED}
        if exhausted - self._exhausted:
            lender = next(rank for rank, count in enumerate(counts) if count != _EXHAUSTED)
            lent = broadcast_from(batch if _rank() == lender else None, lender)
            if _rank() in exhausted:
                self._stand_in = lent
        self._exhausted = exhausted
        # a copy, because steps may change their batch
        return copy.deepcopy(self._stand_in) if _rank() in exhausted else batch


class _Counted(NamedTuple):
    """A batch and its number of samples; a tuple, so that its tensors can be pinned."""

    samples: int
    batch: Any


class _CountingCollate:
    """Collates like the user's function and counts the samples; pickled if workers are spawned."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    @classmethod
    def of(cls, collate: Any) -> _CountingCollate:
        """Return a counting ``collate``; ``collate`` itself if it already counts."""
        return collate if isinstance(collate, cls) else cls(collate)

    def __call__(self, samples: Any) -> _Counted:
        return _Counted(len(samples), self._collate(samples))


def _division(counts: list[int]) -> BatchPlan:
    samples = tuple(max(count, 0) for count in counts)
    # a loader may yield batches without samples on purpose; if all are empty, every batch counts the same
    return BatchPlan(samples if any(samples) else tuple(int(count >= 0) for count in counts))


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
