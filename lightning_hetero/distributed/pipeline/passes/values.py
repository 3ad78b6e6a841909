"""Give a tensor of a model the same values on all ranks that have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.distributed.host_group import host_group

__all__ = ["copy_on_host", "empty_on_host", "equalise"]


def equalise(tensor: Tensor, owners: Sequence[int]) -> None:
    """Give a tensor the values that it has on the first of its owners; every one of them must call this."""
    rank = dist.get_rank()
    source, *others = owners
    if rank == source:
        copy = copy_on_host(tensor)
        for target in others:
            dist.send(copy, dst=target, group=host_group())
    elif rank in others:
        value = empty_on_host(tensor)
        dist.recv(value, src=source, group=host_group())
        tensor.data.copy_(value)


def copy_on_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor in the memory of the host."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def empty_on_host(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and type in the memory of the host."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
