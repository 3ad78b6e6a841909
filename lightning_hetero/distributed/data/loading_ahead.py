"""Know where a batch can be loaded before it is needed, and nobody can tell."""

from __future__ import annotations

from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

__all__ = ["may_load_ahead"]

# They draw when they are first asked, or never.
_DRAW_AT_ONCE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


def may_load_ahead(loader: Any) -> bool:
    """Return whether loading a batch earlier changes nothing but the time at which it is loaded.

    Samples must come from worker processes, and their order must be drawn at the beginning of an epoch. A sampler that
    draws during the epoch, or a dataset that draws in this process, would otherwise draw other numbers than on one
    device, where a step and the loader share a generator. Only classes of torch are known to do so.
    """
    if type(loader) is not DataLoader or loader.num_workers == 0:
        return False
    if isinstance(loader.dataset, IterableDataset):
        return True
    batches: Any = loader.batch_sampler
    sampler = loader.sampler if batches is None else batches.sampler if type(batches) is BatchSampler else None
    # the user's generator may be drawn from at any time, and a checkpoint holds its state
    return type(sampler) in _DRAW_AT_ONCE and getattr(sampler, "generator", None) is None
