"""Keep equal what two ranks have of a layer that they share.

Each of them computes gradients for its micro-batches.  They are added up, and both ranks step their optimisers.  Unlike
devices round differently, so one of them then sends the parameters to the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.distributed.host_group import host_group

__all__ = ["Copies"]

_TAG = 3  # of messages between hosts, other than those of micro-batches


class Copies:
    """Parameters of shared layers that the same ranks have.

    Args:
        parameters: The parameters, in the same order on these ranks.
        ranks: The ranks; the values of the first one count.
        group: The group of these ranks.

    Attributes:
        parameters: The parameters.
        ranks: The ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Sequence[int], group: Any) -> None:
        self.parameters = list(parameters)
        self.ranks = tuple(ranks)
        self._group = group

    def added_up(self, gradients: Mapping[int, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the sums of gradients over the ranks; each of them must call this at the same point.

        A parameter without a gradient on any rank has none, as on one device.

        Args:
            gradients: The gradients on this rank, by the identity of the parameter.
        """
        trained = [p for p in self.parameters if p.requires_grad]
        if not trained:
            return []
        there = self._on_any_rank([id(p) in gradients for p in trained])
        trained = [p for p, is_there in zip(trained, there, strict=True) if is_there]
        found: list[tuple[nn.Parameter, Tensor]] = []
        for alike in _by_kind(trained):
            own = [gradients[id(p)] if id(p) in gradients else torch.zeros_like(p) for p in alike]
            flat = torch.cat([gradient.reshape(-1) for gradient in own])
            dist.all_reduce(flat, group=self._group)
            for gradient, value in zip(own, flat.split([g.numel() for g in own]), strict=True):
                gradient.copy_(value.view(gradient.shape))
            found += zip(alike, own, strict=True)
        return found

    def _on_any_rank(self, there: Sequence[bool]) -> list[bool]:
        """Return what is true on any of the ranks, over the hosts, since a device would have to be waited for."""
        own = torch.tensor(there, device="cpu")
        others = [rank for rank in self.ranks if rank != dist.get_rank()]
        works = [dist.isend(own, other, group=host_group(), tag=_TAG) for other in others]
        found = own.clone()
        for other in others:
            theirs = torch.empty_like(own)
            dist.recv(theirs, other, group=host_group(), tag=_TAG)
            found |= theirs
        for work in works:
            work.wait()
        return [bool(value) for value in found.tolist()]

    @torch.no_grad()
    def send(self) -> None:
        """Give all ranks the values of one of them; each must call this at the same point."""
        for alike in _by_kind([p for p in self.parameters if p.requires_grad]):
            flat = torch.cat([p.reshape(-1) for p in alike])
            dist.broadcast(flat, self.ranks[0], group=self._group)
            if dist.get_rank() != self.ranks[0]:
                for parameter, value in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
                    parameter.copy_(value.view(parameter.shape))


def _by_kind(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters that have the same data type; a message has one."""
    kinds: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(parameter.dtype, []).append(parameter)
    yield from kinds.values()
