"""Which loaders can be divided among ranks, and the division of one that can."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.distributed.agree import AgreedOrder, SizedOrder
from lightning_hetero.distributed.share_loader import share_loader
from lightning_hetero.distributed.share_sampler import ShareBatchSampler
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Divisible", "Undivided", "check_evaluation", "check_training", "divide", "examine"]


@dataclass(frozen=True)
class Divisible:
    """What dividing a loader needs to know of it.

    Attributes:
        loader: the loader, as Lightning hands it over.
        order: the order of the whole epoch, the same on all ranks.
        batch_size: samples a rank under equal shares.
        drop_last: whether a last batch that is not full is left out.
        tells_indices: whether Lightning reads from it which samples a prediction is for.
    """

    loader: DataLoader[Any]
    order: SizedOrder
    batch_size: int
    drop_last: bool
    tells_indices: bool


@dataclass(frozen=True)
class Undivided:
    """A loader that is left as it is, because the user divides its data.

    Attributes:
        reason: why, as part of a sentence.
    """

    reason: str


def examine(dataloader: object, world_size: int, epoch: int) -> Divisible | Undivided:
    """Find out how a loader can be divided.

    Args:
        dataloader: what Lightning's ``process_dataloader`` hook is given.
        world_size: number of ranks.
        epoch: the epoch that the loader will begin with; where a run is resumed that is not the first.

    Raises:
        UnsupportedFeatureError: every rank would train on the same data, since Lightning has given the loader a
            sampler over the whole epoch, but its batches cannot be divided.
    """
    if not isinstance(dataloader, DataLoader) or isinstance(dataloader.dataset, IterableDataset):
        return Undivided("it has no sampler")
    batch_sampler: Any = dataloader.batch_sampler
    # Lightning wraps the batch sampler of predictions in this private class and reads the indices from there
    tells_indices = isinstance(batch_sampler, _IndexBatchSamplerWrapper)
    if tells_indices:
        batch_sampler = batch_sampler._batch_sampler
    order = _whole_order(getattr(batch_sampler, "sampler", dataloader.sampler), world_size, epoch)
    if order is None:
        return Undivided("its sampler is not Lightning's (`use_distributed_sampler=False`)")
    if type(batch_sampler) not in (BatchSampler, ShareBatchSampler):
        raise UnsupportedFeatureError(
            f"`hetero_ddp` cannot divide the batches of {type(batch_sampler).__name__!r}: it needs a loader with"
            f" `batch_size` and a sampler of single samples. Pass those, or use"
            f" `Trainer(use_distributed_sampler=False)` and divide the data yourself."
        )
    return Divisible(dataloader, order, batch_sampler.batch_size, batch_sampler.drop_last, tells_indices)


def divide(
    divisible: Divisible,
    shares: ShareBatchSampler,
    before_fetch: Callable[[], None],
    after_fetch: Callable[[BatchSlice], None],
) -> DataLoader[Any]:
    """Return the loader with the batches of ``shares``; see :func:`share_loader` for the hooks."""
    indices = _IndexBatchSamplerWrapper(shares) if divisible.tells_indices else None
    return share_loader(divisible.loader, shares, before_fetch, after_fetch, indices)


def check_training(dataloaders: Any, training_step: Callable[..., Any]) -> None:
    """Check that the weight of a step's loss follows from the one batch that it is given.

    Args:
        dataloaders: the training loaders.
        training_step: the user's.

    Raises:
        UnsupportedFeatureError: a loader is divided, and there are several, or the step fetches its batches itself.
    """
    divided = _are_divided(dataloaders)
    if not any(divided):
        return
    if len(divided) > 1:
        raise UnsupportedFeatureError(
            f"`hetero_ddp` divides one training loader, got {len(divided)}: with several, one weight for the loss would"
            f' not be exact. Combine them into one dataset or use strategy="ddp".'
        )
    if "dataloader_iter" in inspect.signature(training_step).parameters:
        raise UnsupportedFeatureError(
            "`hetero_ddp` has to know the batch of a step before the step begins, got a `training_step` that takes"
            ' `dataloader_iter`. Take `batch` instead or use strategy="ddp".'
        )


def check_evaluation(dataloaders: Any) -> None:
    """Check that each evaluation step can be told from which batch it stems.

    Raises:
        UnsupportedFeatureError: some loaders are divided and others are not; Lightning reads ahead then.
    """
    divided = _are_divided(dataloaders)
    if any(divided) and not all(divided):
        raise UnsupportedFeatureError(
            f"`hetero_ddp` evaluates either loaders that it divides or loaders that it leaves as they are, got both"
            f" among {len(divided)}. Evaluate them one after the other, or use the same kind of dataset."
        )


def _are_divided(dataloaders: Any) -> list[bool]:
    return [
        isinstance(getattr(loader, "batch_sampler", None), ShareBatchSampler)
        for loader in CombinedLoader(dataloaders).flattened
    ]


def _whole_order(sampler: Any, world_size: int, epoch: int) -> SizedOrder | None:
    """Return the order of the whole epoch, equal on all ranks, or None where ``sampler`` is not known to give it."""
    if isinstance(sampler, AgreedOrder):
        return sampler
    if not isinstance(sampler, DistributedSampler):
        return None
    # Lightning sets the epoch only after workers have begun to read
    sampler.set_epoch(epoch)
    if sampler.num_replicas == 1:
        # Lightning wraps a user's own sampler; only in one of torch's is the order known to be equal on all ranks
        inner = getattr(sampler.dataset, "_sampler", None)
        known = type(sampler) is DistributedSampler or isinstance(inner, SequentialSampler)
        return sampler if known else AgreedOrder(sampler, epoch)
    if type(sampler) is DistributedSampler and sampler.num_replicas == world_size:
        # the user's own, which divides equally: the same order undivided. Its `drop_last` made the parts equal,
        # which they need not be here.
        whole: DistributedSampler[Any] = DistributedSampler(
            sampler.dataset, num_replicas=1, rank=0, shuffle=sampler.shuffle, seed=sampler.seed
        )
        whole.set_epoch(epoch)
        return whole
    return None
