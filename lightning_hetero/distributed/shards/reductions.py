"""Reduce the gradients of units, one at a time, and find out which parameters a backward pass has used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.distributed.shards.exchange import Pending
from lightning_hetero.distributed.shards.flat import FlatParameters
from lightning_hetero.distributed.shards.passes.watch import PassWatch
from lightning_hetero.distributed.shards.shard_tensor import ShardTensor
from lightning_hetero.distributed.shards.unit import Unit
from lightning_hetero.distributed.torch_private import norms_of
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Reductions", "total_norm"]


class Reductions:
    """The reductions of one rank.

    Args:
        units: The units.
        group: The ranks, whose hosts agree in it.
        waiting: Returns a context in which this rank may wait for others.
        watch: What notices that the ranks cannot go on.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        group: dist.ProcessGroup,
        waiting: Callable[[], AbstractContextManager[None]],
        watch: PassWatch,
    ) -> None:
        self._units = units
        self._watch = watch
        self._group, self._waiting = group, waiting
        self._pending: tuple[FlatParameters, Pending] | None = None

    def start(self, unit: Unit, *, muted: bool) -> None:
        """Start to reduce whatever gradients of a unit this rank has.

        Args:
            unit: The unit.
            muted: Whether a gradient of this rank does not say that a parameter is used.
        """
        for flat in unit.flats:
            if flat.trains:
                self.finish()  # one at a time, so that no more gradients are in memory
                self._pending = (flat, flat.start_reducing(counts=not muted))

    def finish(self) -> None:
        """Wait for the reduction that is under way."""
        if self._pending is not None:
            (flat, pending), self._pending = self._pending, None
            with self._waiting():
                total = pending.wait()
            flat.add_reduced(total, self._group.size())

    def agree_on_used(self, *, muted: bool) -> None:
        """Reduce what has come too late, and leave parameters without a gradient that no rank has used."""
        flats = [flat for unit in self._units for flat in unit.flats]
        used = [had for flat in flats for had in flat.had_gradient]
        # A reduction adds to what is used, so what it will find counts now.
        waiting = [gradient is not None and not muted for flat in flats for gradient in flat.gradients]
        late = [unit.has_gradients for unit in self._units]
        own = [*(a or b for a, b in zip(used, waiting, strict=True)), *late]
        of_all = torch.tensor(own, dtype=torch.uint8)
        with self._waiting():
            self._watch.wait(dist.all_reduce(of_all, dist.ReduceOp.MAX, self._group, async_op=True))
            answers = [bool(answer) for answer in of_all.tolist()]
        for unit, is_late in zip(self._units, answers[len(used) :], strict=True):
            if is_late:
                self.start(unit, muted=muted)
        self.finish()
        remaining = iter(answers)
        for flat in flats:
            flat.forget_unused([next(remaining) for _ in flat.shards])

    def without_gradient(self) -> list[str]:
        """Return the names of trained parameters that this rank has not used in the last backward pass."""
        return [
            parameter.name
            for unit in self._units
            for flat in unit.flats
            for parameter, shard, had in zip(flat.parameters, flat.shards, flat.had_gradient, strict=True)
            if shard.requires_grad and not had
        ]


def total_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the norm of all numbers of several parts together; all ranks communicate once.

    Args:
        tensors: Tensors of which each rank holds a part.
        device: Device of this rank.

    Raises:
        UnsupportedFeatureError: One of them is not in parts.
    """
    if not all(isinstance(tensor, ShardTensor) for tensor in tensors):
        raise UnsupportedFeatureError(
            "`hetero_fsdp` cannot clip gradients of parameters that have been added after the set-up: each rank has its"
            " own. Create all parameters in the module's constructor or in `configure_model`."
        )
    shards = [tensor for tensor in tensors if isinstance(tensor, ShardTensor)]
    # not every device has float64; one that has such gradients does, on every rank
    is_wide = device.type == "cpu" or any(shard.dtype in (torch.float64, torch.complex128) for shard in shards)
    total = torch.zeros((), dtype=torch.float64 if is_wide else torch.float32, device=device)
    locals_ = [shard.local for shard in shards if shard.local.numel()]
    for norm in norms_of(locals_) if locals_ else ():
        total += norm.to(total.dtype) ** 2
    dist.all_reduce(total)
    return total.sqrt()
