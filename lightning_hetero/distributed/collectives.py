"""Exchange values between ranks, and make one decision for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from lightning_hetero.distributed.random_state import random_state, restore_random_state

__all__ = [
    "BroadcastOrder",
    "SizedOrder",
    "all_gather",
    "all_gather_counts",
    "all_gather_numbers",
    "broadcast_from",
    "decide_on_rank_zero",
]

Entry = TypeVar("Entry")
Message = TypeVar("Message")
Decision = TypeVar("Decision")


def all_gather(message: Message, group: dist.ProcessGroup | None = None) -> list[Message]:
    """Return the messages of all ranks, in the order of ranks, on every rank.

    Args:
        message: A small picklable value. Every rank must call this at the same point.
        group: Process group whose ranks exchange messages; None for all ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [message]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, message, group)
    return cast("list[Message]", gathered)


def all_gather_counts(count: int, device: torch.device) -> list[int]:
    """Return the integers of all ranks, in the order of ranks, on every rank, with one small all-reduce.

    Args:
        count: The integer of this rank. Every rank must call this at the same point.
        device: Device from which the process group communicates.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [count]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return counts.tolist()


def all_gather_numbers(number: float, device: torch.device) -> list[float]:
    """Return the numbers of all ranks, in the order of ranks, on every rank, with one small all-reduce.

    Args:
        number: The number of this rank, in double precision. Every rank must call this at the same point.
        device: Device from which the process group communicates.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [number]
    numbers = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    numbers[dist.get_rank()] = number
    dist.all_reduce(numbers)
    return numbers.tolist()


def broadcast_from(value: Message, source: int) -> Message:
    """Return the picklable value of rank ``source`` on every rank; every rank must call this at the same point."""
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def decide_on_rank_zero(
    numbers: Sequence[float], decide: Callable[[list[list[float]]], Decision], device: torch.device
) -> Decision:
    """Gather numbers from every rank, decide on rank zero, and return that decision on all ranks.

    One rank decides because floating-point results may differ in the last bit between processors, and ranks that follow
    different plans would lose samples. The numbers travel in one small all-reduce, whatever the number of ranks.

    Args:
        numbers: Numbers of this rank, equally many on every rank. Every rank must call this at the same point.
        decide: Function that rank zero calls with the numbers of all ranks, in the order of ranks; it returns a
            picklable value.
        device: Device from which the process group communicates.

    Raises:
        Exception: Whatever ``decide`` raised, on every rank, so that no rank is left waiting.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return decide([list(numbers)])
    gathered = torch.zeros(dist.get_world_size(), len(numbers), dtype=torch.float64, device=device)
    gathered[dist.get_rank()] = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(gathered)
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = decide(gathered.tolist())
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return cast("Decision", outcome[0])


class SizedOrder(Protocol):
    """The order of an epoch: a sampler with a length, or a list."""

    def __len__(self) -> int:
        """Return the number of entries."""
        ...

    def __iter__(self) -> Iterator[int]:
        """Return an iterator over a new epoch."""
        ...


class BroadcastOrder(Generic[Entry]):
    """Gives all ranks the order that the sampler has on rank zero.

    A sampler that draws from the global random generator gives each rank another order as soon as the generators have
    drawn different amounts. With mini-batches of different size, a single dropout layer is enough for that. Ranks that
    divide different orders lose some samples and repeat others.

    The ranks communicate on construction and when the epoch changes, which all of them do at the same point. They do
    not communicate when one of them iterates: some read ahead, and a callback may iterate on one rank only.

    Args:
        sampler: Sampler of samples or of batches; it is iterated once per epoch.
        epoch: Epoch of the first order.
        resumed: The ``random_state`` of rank zero when an earlier run drew that order; None for a new order.

    Attributes:
        entries: Order of the current epoch.
        random_state: Random state of this rank before it drew that order; see :func:`random_state`.
    """

    def __init__(self, sampler: Iterable[Entry], epoch: int, resumed: Any = None) -> None:
        self.sampler = sampler
        self._epoch = epoch
        now = random_state(sampler)
        known = resumed is not None and restore_random_state(sampler, resumed)
        self.random_state = resumed if known else now
        self.entries: list[Entry] = self._agree()
        if known:
            restore_random_state(sampler, now)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of another epoch; every rank must call this at the same point."""
        if epoch != self._epoch:
            self._epoch = epoch
            self.random_state = random_state(self.sampler)
            self.entries = self._agree()

    def _agree(self) -> list[Entry]:
        # A batch sampler leaves the epoch to the sampler inside it.
        for drawn in (self.sampler, getattr(self.sampler, "sampler", None)):
            set_epoch = getattr(drawn, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self._epoch)
        # Every rank draws, so that all generators advance equally.
        order: list[Any] = [list(self.sampler)]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(order, src=0)
        return cast("list[Entry]", order[0])
