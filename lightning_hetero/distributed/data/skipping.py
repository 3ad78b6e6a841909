"""Start to iterate over a loader later than at its first batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from lightning_hetero.distributed.collectives import length_of

__all__ = ["SkippingSampler", "can_skip", "is_stateful"]


class SkippingSampler:
    """A batch sampler that can start later, so that a resumed run need not load samples that it has seen.

    Args:
        batches: The batch sampler to wrap.

    Attributes:
        skip: Number of batches that the next iteration, and only that one, skips.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.skip = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        return islice(iter(self._batches), skip, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_batches":
            raise AttributeError(name)
        return getattr(self._batches, name)


def can_skip(loader: Any) -> bool:
    """Return whether batches of a loader can be skipped without loading them, since its batch sampler has a length."""
    return isinstance(loader, DataLoader) and length_of(loader.batch_sampler) is not None


def is_stateful(loader: Any) -> bool:
    """Return whether a loader saves its own position, like torchdata's ``StatefulDataLoader``."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
