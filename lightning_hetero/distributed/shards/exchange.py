"""The two collectives of shards of unequal size: gather a unit's parts, and add up its gradients part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.distributed.shards.passes.groups import Groups
from lightning_hetero.distributed.shards.passes.watch import PassWatch
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Exchange", "GlooExchange", "NcclExchange", "Pending", "exchange_for"]


def wait_as_torch(work: Any) -> None:
    """Wait for a collective: on a device only its stream waits, until the time-out of the group."""
    work.wait()


class Pending:
    """Collectives under way.

    Args:
        works: torch's handles.
        result: The tensor that they fill.
        kept: Whatever must stay in memory until they are done.
        wait: Function that waits for one of them.
    """

    def __init__(
        self, works: Sequence[Any], result: Tensor, kept: Any = None, wait: Callable[[Any], object] = wait_as_torch
    ) -> None:
        self._works = works
        self._result = result
        self._kept = kept
        self._wait = wait

    def wait(self) -> Tensor:
        """Wait for the collectives, on CUDA in the current stream, and return what they have filled."""
        for work in self._works:
            self._wait(work)
        self._works, self._kept = (), None
        return self._result


class Exchange(Protocol):
    """Collectives over all ranks; every rank calls them in the same order.

    Attributes:
        group: The ranks.
        in_backward: Whether a backward pass is running; what ranks in different passes send must not meet.
    """

    group: dist.ProcessGroup
    in_backward: bool

    def wait(self, work: Any) -> None:
        """Wait for a collective of the group."""
        ...

    def gather(self, parts: Sequence[Tensor], rank: int) -> Pending:
        """Fill the parts of all other ranks; ``parts[rank]`` holds that of this rank."""
        ...

    def reduce(self, parts: Sequence[Tensor], rank: int) -> Pending:
        """Add up each part over the ranks; the result is this rank's. The parts are lost."""
        ...


class GlooExchange:
    """Collectives of single parts: gloo has none that takes parts of unequal size.

    Args:
        groups: The ranks.
        watch: What notices that the ranks cannot go on.
    """

    def __init__(self, groups: Groups, watch: PassWatch) -> None:
        self.group = groups.forward
        self.in_backward = False
        self._groups = groups
        self.wait = watch.wait

    @property
    def _current(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self._groups.backward if self.in_backward else self._groups.forward
        return group

    def gather(self, parts: Sequence[Tensor], rank: int) -> Pending:
        """Fill the parts of all other ranks; ``parts[rank]`` holds that of this rank."""
        # as bytes, because not every type of number can be sent in every version
        works = [
            dist.broadcast(part.view(torch.uint8), source, self._current, async_op=True)
            for source, part in enumerate(parts)
            if part.numel()
        ]
        return Pending(works, parts[rank], parts, self.wait)

    def reduce(self, parts: Sequence[Tensor], rank: int) -> Pending:
        """Add up each part over the ranks; the result is this rank's. The parts are lost."""
        works = [
            dist.reduce(_real(part), target, group=self._current, async_op=True)
            for target, part in enumerate(parts)
            if part.numel()
        ]
        return Pending(works, parts[rank], parts, self.wait)


class NcclExchange:
    """Collectives of lists, which NCCL runs as one launch if the sizes differ.

    Args:
        group: The ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.in_backward = False  # one communicator for all passes: each takes memory of the device
        self.wait = wait_as_torch

    def gather(self, parts: Sequence[Tensor], rank: int) -> Pending:
        """Fill the parts of all other ranks; ``parts[rank]`` holds that of this rank."""
        work = dist.all_gather(list(parts), parts[rank], self.group, async_op=True)
        return Pending([work], parts[rank], parts)

    def reduce(self, parts: Sequence[Tensor], rank: int) -> Pending:
        """Add up each part over the ranks; the result is this rank's. The parts are lost."""
        result = torch.empty_like(parts[rank])
        addends = [_real(part) for part in parts]
        work = dist.reduce_scatter(_real(result), addends, group=self.group, async_op=True)
        return Pending([work], result, parts)


def _real(part: Tensor) -> Tensor:
    """Return complex numbers as pairs, in the same memory: not every backend adds up complex ones."""
    return torch.view_as_real(part) if part.is_complex() else part


def exchange_for(device: torch.device, groups: Groups, watch: PassWatch) -> Exchange:
    """Return the collectives for tensors of ``device``.

    Args:
        device: The device.
        groups: The ranks.
        watch: What notices that the ranks cannot go on.

    Raises:
        UnsupportedFeatureError: The process group cannot send tensors of that device in parts.
    """
    group = groups.forward
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair)
    backend = backends.get(device.type, dist.get_backend(group))
    if backend == "nccl":
        return NcclExchange(group)
    if backend == "gloo" and device.type == "cpu":
        return GlooExchange(groups, watch)
    raise UnsupportedFeatureError(
        f"`hetero_fsdp` needs NCCL for CUDA devices or gloo for processors, got {backend} for {device}. Leave out"
        f' `process_group_backend`, or use strategy="hetero_ddp", which works over gloo.'
    )
