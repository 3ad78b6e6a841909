"""Make sure that all ranks are in the same pass, by messages where a mistake would mix up what they send."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from lightning_hetero.distributed.shards.passes.places import Place, why_different
from lightning_hetero.distributed.shards.passes.watch import PassWatch

__all__ = ["Meeting"]


class Meeting:
    """Makes sure that all ranks are in the same pass.

    In a training step of one forward and one backward pass, in the known order, nothing is exchanged: the two passes
    have groups of their own on hosts, so what ranks in different passes send never meets, and the watch notices it. In
    other passes each rank tells the others which one it begins, without waiting, and looks at the answers when it must
    wait anyway.

    Args:
        group: The ranks, whose hosts meet in it.
        waiting: Returns a context in which this rank may wait for others.
        watch: What notices that the ranks are in different passes, if they do not tell each other.
    """

    def __init__(
        self, group: dist.ProcessGroup, waiting: Callable[[], AbstractContextManager[None]], watch: PassWatch
    ) -> None:
        self._group, self._waiting, self._watch = group, waiting, watch
        self._work: Any = None
        self._rows: list[torch.Tensor] = []

    @property
    def failed(self) -> bool:
        """Whether the ranks have been found in different passes."""
        return self._watch.reason is not None

    def begin(self, place: Place, *, tell: bool = True) -> None:
        """Begin a pass.

        Args:
            place: The pass.
            tell: Whether the ranks tell each other.
        """
        self.check()
        self._watch.note(place)
        if tell:
            own = torch.tensor(place)
            self._rows = [torch.empty_like(own) for _ in range(self._group.size())]
            self._work = dist.all_gather(self._rows, own, self._group, async_op=True)

    def check(self) -> None:
        """Compare what the ranks have told, once they all have.

        Raises:
            UnsupportedFeatureError: They are in different passes.
        """
        self._watch.check()
        if self._work is None:
            return
        work, self._work = self._work, None
        with self._waiting():
            self._watch.wait(work)
        places = {rank: Place(*row.tolist()) for rank, row in enumerate(self._rows)}
        if len(set(places.values())) > 1:
            self._watch.refuse(why_different(places))
