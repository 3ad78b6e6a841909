"""Keep equal what several ranks have of a layer: two stages that share it, or several replicas.

Each of them computes gradients for its micro-batches.  They are added up, and all these ranks step their optimisers.
Unlike devices round differently, so of two stages that share a layer one then sends the parameters to the other.
Replicas do as DDP does: they step with the same gradients, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.distributed.host_group import host_group
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Copies"]

_TAG = 3  # of messages between hosts, other than those of micro-batches
_BUCKET_BYTES = 25 << 20  # as in DDP


class Copies:
    """Parameters that the same ranks have.

    Several of these groups exchange at the same time: each rank begins with all of them, in one order, before it waits.

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

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters if p.requires_grad]

    def begin_sum(self, gradients: Mapping[int, Tensor]) -> Callable[[], list[tuple[nn.Parameter, Tensor]]]:
        """Begin to add up gradients over the ranks, without waiting for any of them.

        Args:
            gradients: The gradients on this rank, by the identity of the parameter. The sums are put in their place.

        Returns:
            Function that waits for the sums, and returns those of the parameters that have a gradient on any rank.
        """
        heard = self.tell(gradients)
        added_up = self.add_up(self._trained, gradients)

        def finish() -> list[tuple[nn.Parameter, Tensor]]:
            there = {id(p) for p in heard()}
            return [(p, gradient) for p, gradient in added_up() if id(p) in there]

        return finish

    def tell(self, gradients: Mapping[int, Tensor]) -> Callable[[], list[nn.Parameter]]:
        """Tell the other ranks which gradients there are on this one.

        The hosts do so, since a device would have to be waited for.

        Args:
            gradients: The gradients on this rank, by the identity of the parameter.

        Returns:
            Function that waits, and returns the parameters that have a gradient on any rank; others have none, as on
            one device.
        """
        trained = self._trained
        own = torch.tensor([id(p) in gradients for p in trained], dtype=torch.bool, device="cpu")
        others = [rank for rank in self.ranks if rank != dist.get_rank()]
        theirs = [torch.empty_like(own) for _ in others]
        works: list[Any] = []
        if trained:
            works += [dist.isend(own, other, group=host_group(), tag=_TAG) for other in others]
            works += [
                dist.irecv(there, other, group=host_group(), tag=_TAG)
                for there, other in zip(theirs, others, strict=True)
            ]

        def heard() -> list[nn.Parameter]:
            for work in works:
                work.wait()
            found = torch.stack([own, *theirs]).any(0).tolist()
            return [p for p, is_there in zip(trained, found, strict=True) if is_there]

        return heard

    def add_up(
        self, parameters: Sequence[nn.Parameter], gradients: Mapping[int, Tensor]
    ) -> Callable[[], list[tuple[nn.Parameter, Tensor]]]:
        """Add up gradients over the ranks.

        Args:
            parameters: The parameters that have a gradient on any rank.
            gradients: The gradients on this rank, by the identity of the parameter.

        Returns:
            Function that waits for the sums and returns them.
        """
        sums: list[tuple[list[nn.Parameter], list[Tensor], Tensor, Any]] = []
        for alike in _by_kind(parameters):
            own = [gradients[id(p)] if id(p) in gradients else torch.zeros_like(p) for p in alike]
            if any(gradient.layout is not torch.strided for gradient in own):
                raise UnsupportedFeatureError(
                    "`hetero_pipeline` cannot add up sparse gradients over ranks. Leave out `sparse=True` of the"
                    " embedding, or train with `replicas=1` and a schedule with which no layer is shared."
                )
            flat = torch.cat([gradient.reshape(-1) for gradient in own])
            sums.append((alike, own, flat, dist.all_reduce(flat, group=self._group, async_op=True)))

        def added_up() -> list[tuple[nn.Parameter, Tensor]]:
            found: list[tuple[nn.Parameter, Tensor]] = []
            for alike, own, flat, work in sums:
                work.wait()
                _copy(flat, own)
                found += zip(alike, own, strict=True)
            return found

        return added_up

    def send(self) -> Callable[[], None]:
        """Give all ranks the values of the first one; return a function that waits for that."""
        sent: list[tuple[list[nn.Parameter], Tensor, Any]] = []
        with torch.no_grad():
            for alike in _by_kind([p for p in self.parameters if p.requires_grad]):
                flat = torch.cat([p.reshape(-1) for p in alike])
                work = dist.broadcast(flat, self.ranks[0], group=self._group, async_op=True)
                sent.append((alike, flat, work))

        def arrived() -> None:
            for alike, flat, work in sent:
                work.wait()
                if dist.get_rank() != self.ranks[0]:
                    with torch.no_grad():
                        _copy(flat, alike)

        return arrived


def _copy(flat: Tensor, into: Sequence[Tensor]) -> None:
    for tensor, value in zip(into, flat.split([t.numel() for t in into]), strict=True):
        tensor.copy_(value.view(tensor.shape))


def _by_kind(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters of the same data type, which one message has, in buckets."""
    kinds: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(parameter.dtype, []).append(parameter)
    for alike in kinds.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in alike:
            bucket.append(parameter)
            size += parameter.numel() * parameter.element_size()
            if size >= _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
