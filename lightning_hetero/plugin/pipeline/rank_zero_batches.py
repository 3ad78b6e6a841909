"""Let every rank of a pipeline see the batches that rank 0 loads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DistributedSampler, SequentialSampler

from lightning_hetero.distributed.data.changed_loader import changed_loader
from lightning_hetero.distributed.data.loading_ahead import may_load_ahead
from lightning_hetero.distributed.data.single_process import AsSingleProcess
from lightning_hetero.distributed.data.skipping import can_skip, is_stateful
from lightning_hetero.distributed.host_group import is_initialized
from lightning_hetero.distributed.pipeline.batch_stream import ReceivedBatches, SentBatches
from lightning_hetero.distributed.random_state import random_state, restore_random_state
from lightning_hetero.plugin.common.lightning_private import called_by_lightning_loop

__all__ = ["RankZeroBatches", "TrainingBatches"]


class RankZeroBatches:
    """A loader that yields rank 0's batches on every rank.

    All stages need the same samples in the same order, but each rank draws its own random numbers. So only rank 0 loads
    batches and sends them.

    Args:
        loader: The user's loader. After an earlier fit, the user's ``CombinedLoader`` may still hold one of these; its
            original is used then.

    Attributes:
        original: The user's loader.
    """

    def __init__(self, loader: Any) -> None:
        self.original: Any = loader.original if isinstance(loader, RankZeroBatches) else loader
        self._loader = self.original
        self._sent: weakref.ref[SentBatches] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_loader", "_sent", "original"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if not is_initialized():  # read before or after a run, or a pickled copy
            return iter(self._loader)
        if dist.get_rank() != 0:
            return ReceivedBatches()
        in_loop = called_by_lightning_loop()
        sent = None if self._sent is None else self._sent()
        if sent is not None:
            sent.wait()  # workers that stay must not load for two iterations
        try:
            # at once, as on one device: each of several loaders draws its seed before the first one is read
            batches: Iterator[Any] = AsSingleProcess(partial(self._begin, in_loop=in_loop))
        except Exception as error:
            batches = _raise(error)
        if dist.get_world_size() == 1:
            return batches
        sent = SentBatches(batches, ahead=may_load_ahead(self.original))
        self._sent = weakref.ref(sent)
        return sent

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_sent": None}

    def _begin(self, *, in_loop: bool) -> Iterator[Any]:  # noqa: ARG002
        return iter(self._loader)


def _raise(error: Exception) -> Iterator[Any]:
    yield from ()
    raise error


class TrainingBatches(RankZeroBatches):
    """A training loader that continues an interrupted epoch in the same order, after the batches that were trained on.

    The order is drawn again from the random state of the earlier run. A loader that saves its own position, like
    torchdata's ``StatefulDataLoader``, resumes by itself.

    Args:
        loader: The user's loader.
        beginning: Function that returns how many batches of the epoch an earlier run has trained on, and the random
            state from which that run drew its order; None if that state is not known.

    Attributes:
        random_state: The random state from which the order of the current epoch is drawn, see :func:`random_state`;
            None before the first epoch. Only rank 0 knows it.
    """

    def __init__(self, loader: Any, beginning: Callable[[TrainingBatches], tuple[int, Any]]) -> None:
        super().__init__(loader)
        self._beginning = beginning
        self._by_indices = can_skip(self.original) and not is_stateful(self.original)
        self._in_loop = False
        self.random_state: dict[str, Any] | None = None
        if self._by_indices:
            order = _Order(self.original.batch_sampler, self._order_of_indices)
            self._loader = changed_loader(self.original, None, batch_sampler=order)

    def _begin(self, *, in_loop: bool) -> Iterator[Any]:
        self._in_loop = in_loop  # for _order_of_indices, which `iter` may call
        if self._by_indices or is_stateful(self._loader) or not in_loop:
            return iter(self._loader)
        return self._drawn(lambda: iter(self._loader), *self._beginning(self))

    def _order_of_indices(self, draw: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        if not self._in_loop:
            return draw()
        beginning = self._beginning(self)  # the loop's position now, not its position at the first batch

        def order() -> Iterator[Any]:
            yield from self._drawn(draw, *beginning)

        return order()

    def _drawn(self, draw: Callable[[], Iterator[Any]], skip: int, then: Any) -> Iterator[Any]:
        """Begin to draw what the random numbers decide: batches of indices, or whole batches if there are none."""
        now = random_state(self._loader)
        known = bool(skip) and then is not None and restore_random_state(self._loader, then)
        self.random_state = then if known else now
        drawn = islice(draw(), skip, None)
        if known:
            first = list(islice(drawn, 1))  # samplers draw when they are first asked
            restore_random_state(self._loader, now)
            return chain(first, drawn)
        if skip and not _has_fixed_order(self._loader):
            rank_zero_warn(
                "`hetero_pipeline` resumes within an epoch, but the checkpoint does not hold the order of the epoch's"
                f" samples: the remaining batches may repeat samples of the first {skip} and leave out others. Resume"
                " from the end of an epoch, or use a sampler that draws its order from the epoch."
            )
        return drawn


class _Order:
    """A batch sampler whose iterations :class:`TrainingBatches` begins."""

    def __init__(self, batches: Any, begin: Callable[[Callable[[], Iterator[Any]]], Iterator[Any]]) -> None:
        self._batches = batches
        self._begin = begin

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return self._begin(lambda: iter(self._batches))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_batches", "_begin"):
            raise AttributeError(name)
        return getattr(self._batches, name)


def _has_fixed_order(loader: Any) -> bool:
    """Return whether the order of an epoch depends on the epoch alone."""
    return isinstance(getattr(loader, "sampler", None), SequentialSampler | DistributedSampler)
