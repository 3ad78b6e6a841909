"""Determine which loaders can be divided among ranks, and how."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_hetero.distributed.collectives import BroadcastOrder, SizedOrder
from lightning_hetero.distributed.data.changed_loader import changed_loader
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler
from lightning_hetero.plugin.common.lightning_private import inner_batch_sampler, tells_indices

__all__ = [
    "Divisible",
    "Own",
    "Unbatched",
    "deal_batches",
    "examine",
    "original_batch_sampler",
]


@dataclass(frozen=True)
class Divisible:
    """A loader whose batches are made from samples that any rank can load.

    Attributes:
        loader: The loader as Lightning passes it.
        order: The order of the whole epoch, the same on all ranks.
        lists: The batches that the user's batch sampler makes from that order; None if the batch sampler is torch's.
        batch_size: Number of samples per rank with equal shares; None if the user's batch sampler does not tell.
        drop_last: Whether a last batch that is not full is dropped.
        batch_sampler: Name of the batch sampler's class.
        tells_indices: Whether Lightning reads from the loader which samples a prediction is for.
    """

    loader: DataLoader[Any]
    order: SizedOrder
    lists: BroadcastOrder[list[int]] | None
    batch_size: int | None
    drop_last: bool
    batch_sampler: str
    tells_indices: bool


@dataclass(frozen=True)
class Unbatched:
    """A loader whose dataset makes the batches: they cannot be divided, but any rank can load any of them.

    Attributes:
        loader: The loader as Lightning passes it.
        order: The order of the whole epoch, the same on all ranks.
    """

    loader: DataLoader[Any]
    order: SizedOrder


@dataclass(frozen=True)
class Own:
    """A loader that yields its rank's own batches.

    Attributes:
        reason: Reason why the loader cannot be divided, as part of a sentence.
    """

    reason: str


def examine(
    dataloader: object,
    world_size: int,
    epoch: int,
    resumed: Any = None,
    *,
    lazily: bool = False,
    confirmed: bool = False,
) -> Divisible | Unbatched | Own:
    """Determine how a loader can be divided; every rank must call this at the same point.

    Args:
        dataloader: The loader that Lightning passes to ``process_dataloader``.
        world_size: Number of ranks.
        epoch: The epoch with which the loader will begin; not the first one if a run is resumed.
        resumed: Random state of the order in the run that is resumed; see
            :class:`~lightning_hetero.distributed.collectives.BroadcastOrder`.
        lazily: Whether the order of an epoch is drawn when its first batch is requested, as under plain DDP.
        confirmed: Whether the user says that each batch of a batch sampler is a global batch, even of one
            that Lightning has not given an order of its own (``use_distributed_sampler=False``).
    """
    if not isinstance(dataloader, DataLoader) or isinstance(dataloader.dataset, IterableDataset):
        return Own("each rank reads a stream of its own")
    batch_sampler = original_batch_sampler(dataloader)
    if batch_sampler is None:
        order = _whole_order(dataloader.sampler, world_size, epoch, resumed)
        return _own_sampler(dataloader.sampler) if order is None else Unbatched(dataloader, order)
    # torchdata replaces torch's class by its own, which can save its position
    torchs = type(batch_sampler).__name__ == "BatchSampler" and type(batch_sampler).__module__.startswith("torch")
    if not torchs and world_size == 1:
        return Own("its batch sampler is the user's, and there is nothing to divide")
    sampler = batch_sampler.sampler if torchs else _sampler_inside(batch_sampler)
    order = _whole_order(sampler, world_size, epoch, resumed if torchs else None, lazily=lazily or not torchs)
    common = order is None and confirmed and not torchs and not isinstance(sampler, DistributedSampler)
    lists = None
    if not torchs and (order is not None or common):
        by_rank_zero = BroadcastOrder(
            _Lists(batch_sampler, sampler), epoch, resumed, lazily=lazily and not common, common=common
        )
        lists, order = by_rank_zero, by_rank_zero if order is None else order
    if order is None:
        return _own_sampler(sampler if torchs else batch_sampler)
    return Divisible(
        loader=dataloader,
        order=order,
        lists=lists,
        batch_size=getattr(batch_sampler, "batch_size", None),
        drop_last=getattr(batch_sampler, "drop_last", False),
        batch_sampler=type(batch_sampler).__name__,
        tells_indices=tells_indices(dataloader.batch_sampler),
    )


def original_batch_sampler(loader: DataLoader[Any]) -> Any:
    """Return the batch sampler of a loader without the wrappers of Lightning and of an earlier fit."""
    batch_sampler = inner_batch_sampler(loader.batch_sampler)
    return batch_sampler.original if isinstance(batch_sampler, ShareBatchSampler) else batch_sampler


def deal_batches(unbatched: Unbatched, rank: int, world_size: int) -> DataLoader[Any]:
    """Return the loader with every ``world_size``-th batch of the epoch, as under plain DDP but without padding."""
    return changed_loader(unbatched.loader, None, sampler=_EveryNth(unbatched.order, rank, world_size))


def _own_sampler(sampler: Any) -> Own:
    name = type(sampler).__name__
    if isinstance(sampler, DistributedSampler):
        how = (
            "in a way of its own" if type(sampler) is not DistributedSampler else f"among {sampler.num_replicas} ranks"
        )
        return Own(f"its sampler {name!r} is a `DistributedSampler` that divides the data {how}")
    return Own(f"its sampler {name!r} is not Lightning's (`use_distributed_sampler=False`)")


def _whole_order(sampler: Any, world_size: int, epoch: int, resumed: Any, *, lazily: bool = False) -> SizedOrder | None:
    """Return the order of the whole epoch, equal on all ranks; None if ``sampler`` is not known to give it."""
    if isinstance(sampler, (BroadcastOrder, _Undivided)):
        return sampler
    if isinstance(sampler, _EveryNth):
        return sampler.order
    if not isinstance(sampler, DistributedSampler):
        return None
    if not lazily:  # Lightning sets the epoch only after workers have begun to read
        sampler.set_epoch(epoch)
    if sampler.num_replicas == 1:
        # Lightning wraps the user's own sampler; only torch's samplers are known to give all ranks the same order
        inner = getattr(sampler.dataset, "_sampler", None)
        known = type(sampler) is DistributedSampler or isinstance(inner, SequentialSampler)
        return sampler if known else BroadcastOrder(sampler, epoch, resumed, lazily=lazily)
    if type(sampler) is DistributedSampler and sampler.num_replicas == world_size:
        return _Undivided(sampler)  # the user's own, which divides equally
    return None


def _sampler_inside(batch_sampler: Any) -> Any:
    """Return the sampler that Lightning has given to the user's batch sampler, whatever the attribute is called."""
    inside = [value for value in vars(batch_sampler).values() if isinstance(value, DistributedSampler)]
    return inside[0] if len(inside) == 1 else getattr(batch_sampler, "sampler", None)


class _Undivided:
    """The whole order of which a DistributedSampler of the user's gives each rank an equal part.

    It follows the sampler, whose epoch and seed its owner may change.
    """

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        sampler = self.sampler
        # samples that it drops to make the parts equal are dropped here, too
        return sampler.total_size if sampler.drop_last else len(sampler.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Any:
        sampler = self.sampler
        whole: DistributedSampler[Any] = DistributedSampler(
            sampler.dataset, num_replicas=1, rank=0, shuffle=sampler.shuffle, seed=sampler.seed
        )
        whole.set_epoch(sampler.epoch)
        return islice(whole, len(self))

    def set_epoch(self, epoch: int) -> None:
        if self.sampler.epoch != epoch:  # Lightning sets it itself, and its owner may since have set another
            self.sampler.set_epoch(epoch)


class _EveryNth:
    """The entries of an order that plain DDP deals to a rank, without its padding."""

    def __init__(self, order: SizedOrder, rank: int, world_size: int) -> None:
        self.order = order
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(range(self.rank, len(self.order), self.world_size))

    def __iter__(self) -> Any:
        return islice(self.order, self.rank, None, self.world_size)

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.order, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


@dataclass(frozen=True)
class _Lists:
    """A batch sampler and the sampler inside it, on which the epoch is set."""

    batches: Any
    sampler: Any

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)
