"""Tell which batch that a DataLoader has drawn is the one that its class yields.

A user's subclass may yield its batches from a generator, change them, or read some ahead in a thread. What is known of
a batch, its samples or its part of a global batch, is noted between the subclass and torch's class, and follows the
batch through the subclass in the order of batches. Where a yielded batch still holds tensors of a drawn one, they show
whether that order holds.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Drawn", "NotedLoader", "iterates_itself", "library_class"]

Note = Callable[[Any], tuple[Any, Any]]

_ENTRIES_COMPARED = 16
_BATCHES_COMPARED = 64


def library_class(loader: DataLoader[Any]) -> type:
    """Return the class of torch or torchdata that a loader is or inherits from."""
    return next(cls for cls in type(loader).__mro__ if cls.__module__.split(".")[0] in ("torch", "torchdata"))


def iterates_itself(loader: DataLoader[Any]) -> bool:
    """Return whether a subclass of the user's overrides how the loader iterates."""
    library = library_class(loader)
    before = type(loader).__mro__[: type(loader).__mro__.index(library)]
    return any("__iter__" in vars(cls) for cls in before)


class NotedLoader:
    """Notes what a DataLoader draws; goes between a user's class and torch's in the order of classes."""

    _drawn: Drawn | None = None
    _compares = False

    def _noting(self) -> Note:
        """Return a function that takes what the loader draws, and returns what is noted of it and the batch."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Prepare for drawing; called in the thread that calls ``__iter__``, just before torch's class draws."""

    def __iter__(self) -> Any:
        if self.num_workers:  # type: ignore[attr-defined]
            self._begin()  # they are given batches at once
        batches = super().__iter__()  # type: ignore[misc]
        if not self.num_workers:  # type: ignore[attr-defined]
            self._begin()  # torch's class has drawn a seed first, as under plain DDP
        drawn = Drawn(type(self).__name__, compares=self._compares)
        vars(self)["_drawn"] = drawn
        return _NotedIterator(batches, self._noting(), drawn)


class _NotedIterator:
    def __init__(self, batches: Iterator[Any], note: Note, drawn: Drawn) -> None:
        self._batches = batches
        self._note = note
        self._drawn = drawn

    def __iter__(self) -> _NotedIterator:
        return self

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        try:
            item = next(self._batches)
        except StopIteration:
            self._drawn.exhausted = True
            raise
        noted, batch = self._note(item)
        self._drawn.add(noted, batch)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_batches":
            raise AttributeError(name)
        return getattr(self._batches, name)


class Drawn:
    """The batches that a loader has drawn and its class has not yielded.

    Args:
        name: Name of the loader's class, for errors.
        compares: Whether the class may change, reorder or drop batches, so that they have to be compared.

    Attributes:
        exhausted: Whether there are no more batches to draw.
    """

    def __init__(self, name: str, *, compares: bool) -> None:
        self.exhausted = False
        self._name = name
        self._compares = compares
        self._pending: deque[tuple[Any, Any, frozenset[int]]] = deque()
        self._last: tuple[Any, frozenset[int]] = (None, frozenset())
        self._thread = 0
        self._read_ahead: int | None = None

    def add(self, noted: Any, batch: Any) -> None:
        """Note that a batch is drawn."""
        self._thread = threading.get_ident()
        # the batch is kept while it waits, so that its memory cannot belong to another
        self._pending.append((noted, batch, _memory_of(batch)) if self._compares else (noted, None, frozenset()))

    def take(self, batch: Any, *, surely: bool = False) -> Any:
        """Return what was noted of a batch that the class yields.

        Args:
            batch: The batch.
            surely: Whether it must hold memory of a drawn one if several wait.

        Raises:
            UnsupportedFeatureError: It cannot be the next one that was drawn.
        """
        if not self._pending:
            raise self.refused("yields more batches than it draws")
        if self._compares and not self._compare(_memory_of(batch)) and surely and len(self._pending) > 1:
            raise self.refused("draws several batches for other ones")
        noted, drawn, memory = self._pending.popleft()
        self._last = (drawn, memory)
        waiting = len(self._pending)
        if self._read_ahead is None:
            self._read_ahead = waiting
        elif self._compares and waiting > self._read_ahead and self._thread == threading.get_ident():
            raise self.refused("draws more batches than it yields")
        return noted

    def end(self) -> None:
        """Check that all batches were yielded; the class yields no more.

        Raises:
            UnsupportedFeatureError: Some were not, and nobody knows which.
        """
        if self._compares and self.exhausted and self._pending:
            raise self.refused(f"has drawn {len(self._pending)} batches more than it yields")

    def _compare(self, memory: frozenset[int]) -> bool:
        """Return whether a yielded batch holds memory of the next drawn one; raise if it holds that of others."""
        waiting = list(islice(self._pending, _BATCHES_COMPARED))
        known = [self._last[1], *(of_batch for _, _, of_batch in waiting)]
        times = Counter(address for of_batch in known for address in of_batch)
        # a tensor that belongs to several batches tells nothing
        same = [i for i, of_batch in enumerate(known) if any(times[a] == 1 for a in of_batch & memory)]
        if same and same != [1]:
            raise self.refused("yields batches in another order, several times, or several of them together")
        return bool(same)

    def refused(self, what: str) -> UnsupportedFeatureError:
        """Return the error for a class that does not yield exactly what it draws."""
        return UnsupportedFeatureError(
            f"`hetero_ddp` must know which samples are in a batch, got the loader {self._name!r} that {what}. Let its"
            f" `__iter__` yield one batch for each that `super().__iter__()` yields, in the same order, or divide the"
            f" data yourself with Trainer(use_distributed_sampler=False)."
        )


def _memory_of(batch: Any) -> frozenset[int]:
    """Return addresses that show whether two batches hold the same data: of the memory of tensors, or of objects."""
    found: set[int] = set()
    waiting = [batch]
    for value in waiting:
        if isinstance(value, Tensor):
            if value.numel():
                found.add(value.untyped_storage().data_ptr() or id(value))
        elif isinstance(value, Mapping):
            waiting += islice(value.values(), _ENTRIES_COMPARED)
        elif isinstance(value, list | tuple):
            waiting += value[:_ENTRIES_COMPARED]
        elif is_dataclass(value) or type(value).__module__ != "builtins":
            waiting += islice(getattr(value, "__dict__", {}).values(), _ENTRIES_COMPARED)
        if len(waiting) > 4 * _ENTRIES_COMPARED:
            break
    return frozenset(found)
