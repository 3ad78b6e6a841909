"""Parameters of one type in one row of memory, of which each rank keeps a part between the times they are used."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.balance.shards.cuts import Cuts
from lightning_hetero.distributed.in_place import set_value
from lightning_hetero.distributed.shards.exchange import Exchange, Pending
from lightning_hetero.distributed.shards.released import become_released, become_whole, guard_part
from lightning_hetero.distributed.shards.shard_tensor import Division, ShardTensor
from lightning_hetero.distributed.shards.units import PlannedParameter
from lightning_hetero.distributed.torch_private import version_of, without_torch_function
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["FlatParameters"]

_REDUCED_IN_FLOAT32 = (torch.float16, torch.bfloat16)


class FlatParameters:
    """Parameters that are gathered and released together.

    The user's own parameter objects are the leaves of autograd's graph, so their hooks and whoever holds them see what
    they see on one device. While they are released, the parts are registered in their place, and stand in for them.
    What autograd has saved stays valid: it shares the memory, whose size becomes zero and full again.

    Args:
        parameters: The parameters, all of one type.
        cuts: Which rank keeps which numbers.
        rank: This rank.
        device: Device of this rank.
        exchange: Collectives.
    """

    def __init__(
        self, parameters: Sequence[PlannedParameter], cuts: Cuts, rank: int, device: torch.device, exchange: Exchange
    ) -> None:
        self.parameters = parameters
        self.leaves = [parameter.places[0].get() for parameter in parameters]
        self._cuts, self._rank, self._exchange = cuts, rank, exchange
        self._shapes = [tuple(leaf.shape) for leaf in self.leaves]
        self._ends = [0, *accumulate(leaf.numel() for leaf in self.leaves)]
        self._whole = torch.empty(self._ends[-1], dtype=self.leaves[0].dtype, device=device)
        self._parts = self._whole.split(cuts.sizes)
        pieces = self._whole.split([leaf.numel() for leaf in self.leaves])
        self._views = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        nothing = self._whole.new_zeros(())  # the shape of the whole, without its memory
        self._nothing = [nothing.expand(shape) for shape in self._shapes]
        with torch.no_grad():
            for leaf, view in zip(self.leaves, self._views, strict=True):
                view.copy_(leaf)
            # as DDP, which begins with the values of rank 0
            dist.broadcast(self._whole.view(torch.uint8), 0, exchange.group)
            self.local = self._parts[rank].clone()
        self.shards = [self._shard(number) for number in range(len(self.leaves))]
        self.had_gradient = [False] * len(self.leaves)
        self._created = [False] * len(self.leaves)
        self._pending: Pending | None = None
        self._gathered_version = version_of(self.local)
        self.is_whole = True
        self.release()

    def _shard(self, number: int) -> nn.Parameter:
        leaf = self.leaves[number]
        local, division = self._local_part(self.local, number)
        shard = nn.Parameter(ShardTensor(local, division), requires_grad=leaf.requires_grad)
        for name, value in vars(leaf).items():  # what the user has noted about the parameter
            setattr(shard, name, value)
        guard_part(shard, self.parameters[number].name)
        return shard

    def _local_part(self, local: Tensor, number: int) -> tuple[Tensor, Division]:
        begin, end = self._ends[number : number + 2]
        first, _ = self._cuts.range_of(self._rank)
        sizes = self._cuts.within(begin, end)
        start = max(begin - first, 0)
        division = Division(self._shapes[number], sizes, self._rank)
        return local[start : start + sizes[self._rank]], division

    @property
    def trains(self) -> bool:
        """Whether any of the parameters is trained now."""
        return any(shard.requires_grad for shard in self.shards)

    @property
    def whole_bytes(self) -> int:
        """The memory that the gathered parameters take now."""
        return int(self._whole.untyped_storage().nbytes())

    @property
    def address(self) -> int:
        """Where the gathered parameters lie."""
        return self._whole.untyped_storage().data_ptr()

    @property
    def is_stale(self) -> bool:
        """Whether the parts have been changed since the whole parameters were gathered."""
        return (self.is_whole or self._pending is not None) and version_of(self.local) != self._gathered_version

    # ---- gather and release ------------------------------------------------------------------------------------------

    def start_gathering(self) -> None:
        """Allocate memory for the whole parameters, and start to gather them."""
        self._whole.untyped_storage().resize_(self._whole.numel() * self._whole.element_size())
        with torch.no_grad():
            self._parts[self._rank].copy_(self.local)
        self._gathered_version = version_of(self.local)
        self._pending = self._exchange.gather(self._parts, self._rank)

    def gather_again(self) -> None:
        """Gather what this rank has already, because other ranks need it."""
        self.wait()
        self._exchange.gather(self._parts, self._rank).wait()

    def finish_gathering(self) -> None:
        """Wait for what :meth:`start_gathering` has started, and register the whole parameters."""
        self.wait()
        for leaf, shard, view in zip(self.leaves, self.shards, self._views, strict=True):
            become_whole(leaf)
            leaf.data = view
            leaf.requires_grad_(shard.requires_grad)
        self._register(self.leaves, self.shards)
        self.is_whole = True

    def wait(self) -> None:
        """Wait for the gathering, if it is under way."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def release(self, *, keep: bool = False) -> None:
        """Register the parts, and free the memory of the whole parameters.

        Args:
            keep: Whether the parameters may have been written.
        """
        self.wait()
        if self.is_whole:
            if keep:
                self._keep_changes()
            self._register(self.shards, self.leaves)
            for leaf, shard, nothing in zip(self.leaves, self.shards, self._nothing, strict=True):
                leaf.data = nothing
                become_released(leaf, shard)
        self._whole.untyped_storage().resize_(0)
        self.is_whole = False

    def _keep_changes(self) -> None:
        """Copy this rank's part back: a ``forward`` may write parameters, as layers with bounded weights do."""
        if self.is_stale:
            return
        with torch.no_grad():
            for leaf, view in zip(self.leaves, self._views, strict=True):
                if leaf.data_ptr() != view.data_ptr():  # `parameter.data` has been replaced
                    view.copy_(leaf)
            self.local.copy_(self._parts[self._rank])

    def show(self, *, whole: bool) -> None:
        """Register the whole parameters or the parts, and leave the memory of the whole ones alone."""
        if whole:
            self._register(self.leaves, self.shards)
        else:
            self._register(self.shards, self.leaves)

    def follow_freezing(self) -> None:
        """Freeze and unfreeze the whole parameters as the parts are."""
        for leaf, shard in zip(self.leaves, self.shards, strict=True):
            if leaf.requires_grad != shard.requires_grad:
                leaf.requires_grad_(shard.requires_grad)

    def restore(self) -> None:
        """Give the user's parameters their whole values back, in the memory of the host."""
        self.start_gathering()
        self.wait()
        with torch.no_grad():
            values = [view.detach().cpu().clone() for view in self._views]
        for leaf, shard, value in zip(self.leaves, self.shards, values, strict=True):
            become_whole(leaf)
            set_value(leaf, value)
            leaf.grad = None
            leaf.requires_grad_(shard.requires_grad)
        self._register(self.leaves, self.shards)
        self._whole.untyped_storage().resize_(0)

    def _register(self, parameters: Sequence[nn.Parameter], instead_of: Sequence[nn.Parameter]) -> None:
        for planned, parameter, other in zip(self.parameters, parameters, instead_of, strict=True):
            for place in planned.places:
                if place.get() is not other:
                    raise UnsupportedFeatureError(
                        f"`hetero_fsdp`: parameter {planned.name!r} has been replaced after the set-up, by an"
                        f" assignment or by `functional_call`, so it can be neither gathered nor released. Change the"
                        f' values of a parameter in place, or use strategy="hetero_ddp".'
                    )
                place.set(parameter)

    # ---- gradients ---------------------------------------------------------------------------------------------------

    @property
    def gradients(self) -> list[Tensor | None]:
        """The gradients of the whole parameters on this rank; None where there is none."""
        with without_torch_function():
            return [leaf.grad for leaf in self.leaves]

    def start_reducing(self, *, counts: bool = True) -> Pending:
        """Start to add up the gradients of all ranks; those of this rank are then gone.

        Args:
            counts: Whether a gradient says that this rank has used the parameter.
        """
        dtype = torch.float32 if self._whole.dtype in _REDUCED_IN_FLOAT32 else self._whole.dtype
        row = torch.empty(self._ends[-1], dtype=dtype, device=self._whole.device)
        gradients = self.gradients
        for number, gradient in enumerate(gradients):
            part = row[self._ends[number] : self._ends[number + 1]]
            if gradient is None:
                part.zero_()
            else:
                part.copy_(gradient.to_dense().reshape(-1) if gradient.is_sparse else gradient.reshape(-1))
                self.had_gradient[number] |= counts
        del gradients
        with without_torch_function():
            for leaf in self.leaves:
                leaf.grad = None
        return self._exchange.reduce(row.split(self._cuts.sizes), self._rank)

    def add_reduced(self, total: Tensor, ranks: int) -> None:
        """Add the mean over ranks to the gradients of the parts.

        Args:
            total: This rank's part of the sum over ranks.
            ranks: Number of ranks.
        """
        mean = total.div(ranks).to(self.local.dtype)  # a copy: the sum lies in the memory of all parts
        for number, shard in enumerate(self.shards):
            if not shard.requires_grad:
                continue
            local, division = self._local_part(mean, number)
            if shard.grad is None:
                shard.grad = ShardTensor(local, division)
                self._created[number] = True
            else:
                shard.grad.add_(ShardTensor(local, division))

    def forget_unused(self, used: Sequence[bool]) -> None:
        """Remove the gradients, all zero, of parameters that no rank has used.

        Args:
            used: For each parameter, whether any rank has computed a gradient.
        """
        for shard, created, was_used in zip(self.shards, self._created, used, strict=True):
            if created and not was_used:
                shard.grad = None

    def begin_backward(self) -> None:
        """Note which parameters have gradients of earlier passes that are not reduced."""
        self.had_gradient = [gradient is not None for gradient in self.gradients]
        self._created = [False] * len(self.leaves)
