"""Exchange values between the hosts of ranks, and make one decision for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.distributed.host_group import group_of, host_group, is_initialized
from lightning_hetero.distributed.random_state import random_state, restore_random_state
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = [
    "BroadcastOrder",
    "SizedOrder",
    "all_gather",
    "all_gather_counts",
    "all_gather_numbers",
    "all_wait",
    "broadcast_flag",
    "broadcast_from",
    "decide_on_rank_zero",
    "length_of",
    "reduce_in_place",
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
    if not is_initialized():
        return [message]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, message, group_of(group))
    return cast("list[Message]", gathered)


def all_gather_counts(count: int) -> list[int]:
    """Return the integers of all ranks, in the order of ranks, on every rank, with one small all-reduce.

    Args:
        count: The integer of this rank. Every rank must call this at the same point.
    """
    return _all_gathered(count, torch.int64)


def all_gather_numbers(number: float) -> list[float]:
    """Return the numbers of all ranks, in the order of ranks, on every rank, with one small all-reduce.

    Args:
        number: The number of this rank, in double precision. Every rank must call this at the same point.
    """
    return _all_gathered(number, torch.float64)


def _all_gathered(number: Any, dtype: torch.dtype) -> list[Any]:
    if not is_initialized():
        return [number]
    numbers = torch.zeros(dist.get_world_size(), dtype=dtype, device="cpu")
    numbers[dist.get_rank()] = number
    dist.all_reduce(numbers, group=host_group())
    return numbers.tolist()


def all_wait() -> None:
    """Wait until every rank has called this, without waiting for any device."""
    if is_initialized():
        dist.barrier(group=host_group())


def broadcast_from(value: Message, source: int) -> Message:
    """Return the picklable value of rank ``source`` on every rank; every rank must call this at the same point."""
    values = [value]
    dist.broadcast_object_list(values, src=source, group=host_group())
    return values[0]


def reduce_in_place(tensor: Tensor, operation: Any, group: dist.ProcessGroup | None = None) -> Tensor:
    """Reduce a tensor over ranks on its device, for which the host does not wait, and return it.

    Args:
        tensor: The values of this rank. Every rank of the group must call this at the same point.
        operation: An operation of torch, or its name; "mean" is "avg".
        group: Process group to reduce over; None for all ranks.
    """
    name = operation.lower() if isinstance(operation, str) else None
    # only NCCL computes means itself
    divides = name in ("mean", "avg") and f"{tensor.device.type}:nccl" not in dist.get_backend_config(group).split(",")
    if name is not None:
        operation = dist.ReduceOp.SUM if divides else getattr(dist.ReduceOp, {"mean": "AVG"}.get(name, name.upper()))
    dist.all_reduce(tensor, op=operation, group=group)
    if not divides:
        return tensor
    ranks = dist.get_world_size(group)
    return tensor.div_(ranks) if tensor.is_floating_point() else tensor.copy_(tensor / ranks)


def broadcast_flag(flag: bool) -> bool:
    """Return the flag of rank 0 on every rank; every rank must call this at the same point."""
    value = torch.tensor([int(flag)], dtype=torch.int64, device="cpu")
    dist.broadcast(value, src=0, group=host_group())
    return bool(value)


def decide_on_rank_zero(numbers: Sequence[float], decide: Callable[[list[list[float]]], Decision]) -> Decision:
    """Gather numbers from every rank, decide on rank zero, and return that decision on all ranks.

    One rank decides because floating-point results may differ in the last bit between processors, and ranks that follow
    different plans would lose samples. The numbers travel in one small all-reduce, whatever the number of ranks.

    Args:
        numbers: Numbers of this rank, equally many on every rank. Every rank must call this at the same point.
        decide: Function that rank zero calls with the numbers of all ranks, in the order of ranks; it returns a
            picklable value.

    Raises:
        Exception: Whatever ``decide`` raised, on every rank, so that no rank is left waiting.
    """
    if not is_initialized():
        return decide([list(numbers)])
    gathered = torch.zeros(dist.get_world_size(), len(numbers), dtype=torch.float64, device="cpu")
    gathered[dist.get_rank()] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    dist.all_reduce(gathered, group=host_group())
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = decide(gathered.tolist())
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=host_group())
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

    The ranks communicate when an order is drawn, which all of them do at the same point. They do not communicate when
    one of them iterates: some read ahead, and a callback may iterate on one rank only.

    Args:
        sampler: Sampler of samples or of batches; it is iterated once per epoch.
        epoch: Epoch of the first order.
        resumed: The ``random_state`` of rank zero when an earlier run drew that order; None for a new order.
        lazily: Whether an order is drawn only by :meth:`draw`, if the sampler has a length, and not on construction and
            when the epoch changes. What its owner changes at the beginning of an epoch then counts for that epoch.
        common: Whether the first order must be the same on all ranks without this class.

    Attributes:
        random_state: Random state of this rank before it drew the latest order; see :func:`random_state`.
    """

    def __init__(
        self, sampler: Iterable[Entry], epoch: int, resumed: Any = None, *, lazily: bool = False, common: bool = False
    ) -> None:
        self.sampler = sampler
        self._epoch = epoch
        self._common = common
        self._lazily = lazily and length_of(sampler) is not None
        self._compared = False
        self._entries: list[Entry] | None = None
        self._seen: list[Entry] | None = None
        now = random_state(sampler)
        known = resumed is not None and restore_random_state(sampler, resumed)
        self.random_state = resumed if known else now
        if known or not self._lazily:
            self._set_epochs()
            self._entries = self._agree()
        if known:
            restore_random_state(sampler, now)

    @property
    def entries(self) -> list[Entry]:
        """The order of the current epoch; before it is drawn, the order as it looks to this rank alone."""
        if self._entries is not None:
            return self._entries
        if self._seen is None:
            now = random_state(self.sampler)
            self._seen = list(self.sampler)
            restore_random_state(self.sampler, now)
        return self._seen

    def __len__(self) -> int:
        """Return the number of entries; before the order is drawn, what the sampler says."""
        return len(self.entries if self._entries is not None else cast("Sized", self.sampler))

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch; every rank must call this at the same point."""
        changed = epoch != self._epoch
        self._epoch = epoch
        self._set_epochs()
        if changed:
            self._entries = self._seen = None
            if not self._lazily:
                self.draw()

    def draw(self) -> None:
        """Draw the order of the epoch if it is not drawn; every rank must call this at the same point."""
        if self._entries is None:
            self.random_state = random_state(self.sampler)
            self._entries = self._agree()
            self._seen = None

    def _set_epochs(self) -> None:
        # A batch sampler leaves the epoch to the sampler inside it.
        for drawn in (self.sampler, getattr(self.sampler, "sampler", None)):
            set_epoch = getattr(drawn, "set_epoch", None)
            if callable(set_epoch) and getattr(drawn, "epoch", None) != self._epoch:  # Lightning may have set it
                set_epoch(self._epoch)

    def _agree(self) -> list[Entry]:
        # Every rank draws, so that all generators advance equally.
        own = list(self.sampler)
        if not is_initialized():
            return own
        order = broadcast_from(own, 0)
        if not self._compared:
            self._compared = True
            if any(all_gather(_samples(own) != _samples(order))) and dist.get_rank() == 0:
                warnings.warn(
                    f"`hetero_ddp`: the sampler {_name_of(self.sampler)!r} yields other samples on each rank. As under"
                    f" `ddp`, what it yields is divided among the ranks again, so samples are never seen; here they are"
                    f" those of rank 0. Yield the same samples on all ranks, or divide them yourself and pass"
                    f" Trainer(use_distributed_sampler=False).",
                    stacklevel=2,
                )
        if self._common and not all(all_gather(own == order)):
            raise UnsupportedFeatureError(
                f"`global_batch_size` takes each batch of {_name_of(self.sampler)!r} as a global batch, so they must be"
                f" the same on every rank, got others. If it divides the data itself, leave out `global_batch_size`; if"
                f" it draws random numbers, seed them equally: `seed_everything(...)`."
            )
        self._common = False  # its random numbers may differ later
        return order


def _name_of(sampler: Any) -> str:
    inner = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # Lightning's wrapper
    return type(getattr(inner, "batches", inner)).__name__


def _samples(order: Sequence[Any]) -> set[Any]:
    """Return which samples an order has; none if it repeats some, because such orders are drawn and differ anyway."""
    entries = [index for entry in order for index in (entry if isinstance(entry, list | tuple) else [entry])]
    try:
        samples = set(entries)
    except TypeError:  # no indices
        return set()
    return samples if len(samples) == len(entries) else set()


def length_of(loader: Any) -> int | None:
    """Return the number of batches of a loader or of entries of a sampler, or None if it is unknown."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
