"""Every rank of a pipeline sees the batches that rank 0 loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from lightning_hetero.exceptions import RankFailedError

__all__ = ["RankZeroBatches"]

_BATCH, _END, _ERROR = range(3)


class RankZeroBatches:
    """A loader in the place of the user's.

    Stages need the same samples in the same order, and ranks draw random numbers of their own; only rank 0 loads.

    Args:
        loader: the user's.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return self._send() if dist.get_rank() == 0 else self._receive()

    def _send(self) -> Iterator[Any]:
        try:
            for batch in self._loader:
                dist.broadcast_object_list([(_BATCH, batch)], src=0)
                yield batch
        except Exception as error:
            dist.broadcast_object_list([(_ERROR, f"{type(error).__name__}: {error}")], src=0)
            raise
        dist.broadcast_object_list([(_END, None)], src=0)

    def _receive(self) -> Iterator[Any]:
        while True:
            received: list[Any] = [None]
            dist.broadcast_object_list(received, src=0)
            kind, value = received[0]
            if kind == _END:
                return
            if kind == _ERROR:
                raise RankFailedError(f"Rank 0 could not load a batch: {value}")
            yield value
