"""A tensor of which each rank holds a part: it has the shape of the whole, and the memory of the part.

Parameters, their gradients and the states of optimisers are of this type between steps. Whatever is computed element by
element is computed on each rank's part. Norms, sums, means and extrema of a whole tensor communicate and return what a
single device would. Everything else raises: nothing is computed on a part as if it were the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_hetero.distributed.host_group import group_for
from lightning_hetero.distributed.torch_private import (
    CONVERT,
    FOREACH_MAX,
    FOREACH_NORM,
    UNSCALE,
    unscale,
    without_torch_function,
    wrapper_of,
)
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Division", "ShardTensor"]

aten: Any = torch.ops.aten
# They do not look at the values of other elements, but torch does not mark them as such.
_ELEMENTWISE = {
    aten.clone,
    aten.empty_like,
    aten.fill_,
    aten.full_like,
    aten.ones_like,
    aten.zero_,
    aten.zeros_like,
    CONVERT,
}

# They return the same memory.
_ALIASES = {aten.alias, aten.detach, aten.lift_fresh}

_OF_WHOLE = (Tensor.numpy, Tensor.tolist, Tensor.__array__)
_NO_HOOKS = (
    "A hook on a parameter of which each rank holds a part would never be called: backward passes compute the gradient"
    " of the whole. Register it in the module's constructor, where it sees this rank's gradient as under `hetero_ddp`,"
    " or use the gradient in `on_after_backward`."
)

_NO_GRADIENT = (
    "`torch.autograd.grad` cannot compute the gradient of a parameter of which each rank holds a part. Call"
    " `self.manual_backward` and read `parameter.grad`."
)


@dataclass(frozen=True)
class Division:
    """How the numbers of one tensor are divided.

    Attributes:
        shape: Shape of the whole tensor.
        sizes: How many numbers each rank holds, in their order in memory.
        rank: This rank.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    rank: int

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, as a view where that is possible."""
        begin = sum(self.sizes[: self.rank])
        return whole.reshape(-1)[begin : begin + self.sizes[self.rank]]


class ShardTensor(Tensor):
    """This rank's part of a tensor.

    Args:
        local: The part, in one dimension.
        division: How the whole is divided.
        owner: Tensor of the same memory that counts its changes; ``local`` by default.
    """

    local: Tensor
    division: Division
    owner: Tensor

    @staticmethod
    @override
    def __new__(cls, local: Tensor, division: Division, owner: Tensor | None = None) -> ShardTensor:
        """Make a tensor that has the shape of the whole and no memory besides the part."""
        shard: ShardTensor = wrapper_of(cls, division.shape, local)
        shard.local, shard.division = local, division
        shard.owner = local if owner is None else owner
        return shard

    def __init__(self, local: Tensor, division: Division, owner: Tensor | None = None) -> None:
        """Do nothing: ``__new__`` has set everything, and an object passes here again if it becomes a parameter."""

    @override
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch has no annotations
        held = self.division.sizes[self.division.rank]
        return f"ShardTensor({held} of {self.numel()} numbers, shape={tuple(self.shape)}, dtype={self.dtype})"

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = ShardTensor(self.local.detach().clone(), self.division)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        elif self.requires_grad:
            copied.requires_grad_()
        memo[id(self)] = copied
        return copied

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedFeatureError(
            "A part of a parameter cannot be saved or sent by itself. Save with `trainer.save_checkpoint`, or take"
            " `full_tensor()` first, on all ranks."
        )

    def full_tensor(self) -> Tensor:
        """Return the whole tensor on every rank; every rank must call this at the same point."""
        parts = [self.local.new_empty(size) for size in self.division.sizes]
        for rank, part in enumerate(parts):
            if part.numel():
                if rank == self.division.rank:
                    part.copy_(self.local.detach())
                # as bytes, because not every type can be sent in every version
                dist.broadcast(part.view(torch.uint8), rank, group_for(part))
        return torch.cat(parts).view(self.division.shape)

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_WHOLE:
            raise UnsupportedFeatureError(_why_not(func.__name__))
        if func is torch.autograd.grad:
            raise UnsupportedFeatureError(_NO_GRADIENT)
        with without_torch_function():
            return func(*args, **(kwargs or {}))

    @property
    def data(self) -> Any:
        """The part, without autograd; writing a tensor writes its values, because others hold the same memory."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
            raise UnsupportedFeatureError(
                f"`parameter.data` can be replaced only by a tensor of the same shape, type and device, got"
                f" {tuple(value.shape)}, {value.dtype} and {value.device} for {self!r}. Change the module before the"
                f" training begins."
            )
        with torch.no_grad():
            self.detach().copy_(value)

    @override
    def register_hook(self, hook: Any) -> Any:
        raise UnsupportedFeatureError(_NO_HOOKS)

    @override
    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        raise UnsupportedFeatureError(_NO_HOOKS)

    @classmethod
    @override
    def __torch_dispatch__(  # type: ignore[override]  # torch assigns its default
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = func.overloadpacket
        if operator in _REDUCTIONS:
            return _REDUCTIONS[operator](operator, *args, **kwargs)
        if operator in (aten.copy_, aten.equal):
            return (_copy if operator is aten.copy_ else _equal)(*args, **kwargs)
        if operator is aten.view_as_real:
            return _as_real(args[0])
        if operator in _ALIASES:
            return ShardTensor(func(args[0].local), args[0].division, args[0].owner)
        if operator is FOREACH_NORM:
            return _norms(args[0], *args[1:2])
        if operator is UNSCALE:
            return _unscale(*args)
        name = str(operator).split(".")[-1]
        of_lists = name.startswith(("_foreach_", "_fused_")) and operator is not FOREACH_MAX
        if of_lists or operator in _ELEMENTWISE or torch.Tag.pointwise in func.tags:
            return _elementwise(func, name, args, kwargs, of_lists=of_lists)
        raise UnsupportedFeatureError(_why_not(name))


def _why_not(name: str) -> str:
    return (
        f"`{name}` cannot be computed on a parameter of which each rank holds a part, nor on its gradient and states:"
        f" it looks at numbers that other ranks hold. A parameter is whole only in the `forward` of the unit that owns"
        f" it: use it there, take `full_tensor()` on all ranks, or use another optimiser. Under `hetero_ddp` parameters"
        f" are whole everywhere."
    )


def _elementwise(func: Any, name: str, args: Any, kwargs: Any, *, of_lists: bool) -> Any:
    if of_lists:
        return _over_lists(func, name, args, kwargs)
    division = _common_division(name, [*args, *kwargs.values()])
    in_place = name.endswith("_")
    if in_place and not isinstance(args[0], ShardTensor):
        raise UnsupportedFeatureError(_why_not(name))
    local = partial(_local, division=division)
    result = func(*tree_map(local, args), **tree_map(local, kwargs))
    if in_place:
        _note_change(args[:1])
        return args[0]
    return tree_map(lambda value: ShardTensor(value, division) if isinstance(value, Tensor) else value, result)


def _over_lists(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    lists = [value for value in [*args, *kwargs.values()] if isinstance(value, list | tuple)]
    divisions: list[Division] = []
    for index, first in enumerate(lists[0] if lists else []):
        if not isinstance(first, ShardTensor):
            raise UnsupportedFeatureError(_why_not(name))
        divisions.append(_common_division(name, [values[index] for values in lists if len(values) == len(lists[0])]))

    def local(value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == len(divisions):
            return [_local(entry, division) for entry, division in zip(value, divisions, strict=True)]
        return value

    result = func(*map(local, args), **{key: local(value) for key, value in kwargs.items()})
    if result is None or name.endswith("_"):
        _note_change(lists[0])
        return result
    return [ShardTensor(value, division) for value, division in zip(result, divisions, strict=True)]


def _note_change(shards: Iterable[Any]) -> None:
    """Count a change of parts: below autograd torch counts none, and gives each alias a count of its own."""
    increment_version([shard.owner for shard in shards])


def _common_division(name: str, values: Sequence[Any]) -> Division:
    """Return the division of the first part among ``values``; beside parts of one shape only numbers are allowed."""
    division: Division | None = None
    for value in values:
        if isinstance(value, ShardTensor):
            division = division or value.division
            if value.division.shape != division.shape:
                raise UnsupportedFeatureError(_why_not(name))
        elif isinstance(value, Tensor) and value.dim():
            raise UnsupportedFeatureError(_why_not(name))
    assert division is not None
    return division


def _local(value: Any, division: Division) -> Any:
    """Return this rank's part of a tensor; if it is divided otherwise, the ranks communicate."""
    if not isinstance(value, ShardTensor):
        return value
    return value.local if value.division == division else division.part_of(value.full_tensor())


def _as_real(shard: ShardTensor) -> ShardTensor:
    """Return a view of complex numbers as pairs of real ones, as optimisers compute with them."""
    division = shard.division
    pairs = Division((*division.shape, 2), tuple(2 * size for size in division.sizes), division.rank)
    return ShardTensor(torch.view_as_real(shard.local).flatten(), pairs, shard.owner)


def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, ShardTensor):
        raise UnsupportedFeatureError(_why_not("copy_"))
    if isinstance(source, ShardTensor):
        _common_division("copy_", [target, source])
        source = _local(source, target.division)
    elif source.dim():  # a whole tensor that every rank has, for example from a checkpoint
        if source.shape != target.shape:
            raise UnsupportedFeatureError(_why_not("copy_"))
        source = target.division.part_of(source)
    target.local.copy_(source, non_blocking)
    _note_change([target])
    return target


# ---- reductions ------------------------------------------------------------------------------------------------------


def _reduced(value: Tensor, operation: Any) -> Tensor:
    dist.all_reduce(value, operation, group_for(value))
    return value


def _sum(_: Any, shard: ShardTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    _check_whole("sum", dim, keepdim)
    local = shard.local.sum(dtype=torch.float32 if _is_half(shard.local) else dtype)
    usual = shard.dtype if shard.is_floating_point() else torch.int64
    return _reduced(local, dist.ReduceOp.SUM).to(dtype or usual)


def _mean(_: Any, shard: ShardTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return _sum(None, shard, dim, keepdim, dtype=dtype) / shard.numel()


def _norm(
    _: Any, shard: ShardTensor, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    _check_whole("norm", dim, keepdim)
    return _norms([shard], 2 if p is None else p)[0].to(dtype or shard.dtype)


def _norms(shards: Sequence[Any], p: Any = 2) -> list[Tensor]:
    """Return the norm of each tensor; all ranks communicate once for all of them."""
    _check_shards("_foreach_norm", shards)
    order = float(p)
    power = 1.0 if order == 0.0 else order
    values = []
    for shard in shards:
        local = shard.local.float() if _is_half(shard.local) else shard.local
        if not local.numel():
            values.append(local.new_full((), math.inf if order == -math.inf else 0.0))
        else:
            norm = torch.linalg.vector_norm(local, order)
            values.append(norm if math.isinf(order) else norm**power)
    operation = {math.inf: dist.ReduceOp.MAX, -math.inf: dist.ReduceOp.MIN}.get(order, dist.ReduceOp.SUM)
    total = _reduced(torch.stack(values), operation) if values else torch.empty(0)
    total = total if math.isinf(order) else total ** (1.0 / power)
    return [value.to(shard.dtype) for value, shard in zip(total.unbind(), shards, strict=True)]


def _extremum(operator: Any, shard: ShardTensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    name = str(operator).split(".")[-1]
    _check_whole(name, dim, keepdim)
    local, largest = shard.local, name.endswith("max")
    if local.numel():
        value = local.max() if largest else local.min()
    else:
        limits: Any = torch.finfo(local.dtype) if local.is_floating_point() else torch.iinfo(local.dtype)
        value = local.new_full((), limits.min if largest else limits.max)
    return _reduced(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN)


def _truth(operator: Any, shard: ShardTensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    is_any = str(operator).endswith("any")
    _check_whole("any", dim, keepdim)
    value = (shard.local.any() if is_any else shard.local.all()).to(torch.uint8)
    return _reduced(value, dist.ReduceOp.MAX if is_any else dist.ReduceOp.MIN).bool()


def _equal(first: Any, second: Any) -> bool:
    _check_shards("equal", [first, second])
    if first.shape != second.shape:
        return False
    return bool(_truth(aten.all, first == second))


def _check_whole(name: str, dim: Any, keepdim: bool) -> None:
    if keepdim or (dim is not None and dim != []):
        raise UnsupportedFeatureError(_why_not(f"{name} over dimensions"))


def _check_shards(name: str, values: Sequence[Any]) -> None:
    if not all(isinstance(value, ShardTensor) for value in values):
        raise UnsupportedFeatureError(_why_not(name))


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


_REDUCTIONS: dict[Any, Callable[..., Tensor]] = {
    aten.sum: _sum,
    aten.mean: _mean,
    **dict.fromkeys((aten.norm, aten.linalg_vector_norm), _norm),
    **dict.fromkeys((aten.max, aten.min, aten.amax, aten.amin), _extremum),
    **dict.fromkeys((aten.any, aten.all), _truth),
}


def _unscale(gradients: Sequence[Any], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Unscale gradients as a GradScaler asks for, and tell all ranks of a number that is not finite on one of them."""
    _check_shards("unscale", gradients)
    locals_ = [gradient.local for gradient in gradients if gradient.local.numel()]
    if locals_:
        unscale(locals_, found_inf, inverse_scale)
    _reduced(found_inf, dist.ReduceOp.MAX)
