"""The buffers of a model, which every rank holds whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.distributed.shards.units import initialise

__all__ = ["Buffers"]


class Buffers:
    """The buffers that a model has at the set-up, as DDP keeps them: others are each rank's own.

    Args:
        root: The model, whose buffers are moved to the device and get the values of rank 0.
        device: Device of this rank.
        group: The ranks.
        waiting: Returns a context in which this rank may wait for others.
        wait: Function that waits for a collective of the group.
    """

    def __init__(
        self,
        root: nn.Module,
        device: torch.device,
        group: dist.ProcessGroup,
        waiting: Callable[[], AbstractContextManager[None]],
        wait: Callable[[Any], object],
    ) -> None:
        self._group, self._waiting, self._wait = group, waiting, wait
        for module in root.modules():
            own = dict(module.named_buffers(recurse=False))
            if any(buffer.is_meta for buffer in own.values()):
                initialise(module, [*own.values()], device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in root.buffers():
            if buffer.numel():
                self._by_type.setdefault(buffer.dtype, []).append(buffer)
        self.synchronise()

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._by_type)

    def synchronise(self) -> None:
        """Give all ranks the buffers of rank 0."""
        with torch.no_grad(), self._waiting():
            for buffers in self._by_type.values():
                row = torch.cat([buffer.reshape(-1) for buffer in buffers])
                self._wait(dist.broadcast(row.view(torch.uint8), 0, self._group, async_op=True))
                for buffer, value in zip(buffers, row.split([b.numel() for b in buffers]), strict=True):
                    buffer.copy_(value.view(buffer.shape))
