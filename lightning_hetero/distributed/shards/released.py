"""What the user's parameter objects are while their unit is released, and where gradients must not arrive."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_hetero.distributed.shards.shard_tensor import ShardTensor
from lightning_hetero.distributed.torch_private import without_torch_function
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["ReleasedParameter", "become_released", "become_whole", "guard_part", "hook_on", "without_gradients"]


class ReleasedParameter(nn.Parameter):
    """A parameter object of the user whose unit is released.

    Lists that the user has made before the training hold these objects. Whatever is asked of one is asked of the part
    that is registered in its place, so such a list sees and changes what the model will use. Only the object's class
    changes, so it stays the same leaf of autograd's graph.
    """

    part: ShardTensor
    own_class: type[nn.Parameter]

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.backward:  # as one of its inputs
            with without_torch_function():
                return func(*args, **kwargs)
        args, kwargs = tree_map(_part, args), tree_map(_part, kwargs)
        name = getattr(func, "__name__", "")
        first: Any = args[0] if args else None
        if isinstance(first, ShardTensor):
            if name in ("__get__", "__set__"):  # of an attribute, which ShardTensor may define itself
                attribute = func.__self__.__name__
                return getattr(first, attribute) if name == "__get__" else setattr(first, attribute, args[1])
            if name in vars(ShardTensor):
                return getattr(first, name)(*args[1:], **kwargs)
        return func(*args, **kwargs)

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.part, memo)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.part.__reduce_ex__(protocol)

    def full_tensor(self) -> Tensor:
        """Return the whole tensor on every rank; every rank must call this at the same point."""
        return self.part.full_tensor()


def _part(value: Any) -> Any:
    return value.part if isinstance(value, ReleasedParameter) else value


def become_released(leaf: Any, part: Any) -> None:
    """Let a parameter stand for its part from now on."""
    leaf.part, leaf.own_class = part, type(leaf)
    leaf.__class__ = ReleasedParameter


def become_whole(leaf: Any) -> None:
    """Let a parameter be itself again."""
    if type(leaf) is ReleasedParameter:
        own: Any = leaf.own_class
        leaf.__class__ = own
        del leaf.part, leaf.own_class


def hook_on(tensor: Tensor, register: Callable[..., Any], hook: Callable[[Tensor], Any]) -> Any:
    """Register a hook on the gradient of a parameter that may be frozen now and trained later.

    Args:
        tensor: The parameter.
        register: The method of ``Tensor`` that registers the hook.
        hook: The hook.
    """
    with without_torch_function():
        frozen = not tensor.requires_grad
        tensor.requires_grad_()
        try:
            return register(tensor, hook)
        finally:
            tensor.requires_grad_(not frozen)


@contextmanager
def without_gradients(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Replace the gradients of parameters by zeros: a product with zero would not do, as they may be infinite."""
    with without_torch_function():
        handles = [leaf.register_hook(torch.zeros_like) for leaf in leaves if leaf.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def guard_part(part: Tensor, name: str) -> None:
    """Raise if a backward pass computes a gradient of a part: it is that of the whole parameter that must be reduced.

    Args:
        part: The part.
        name: Name of the parameter in the model.
    """

    def refuse(_: Tensor) -> NoReturn:
        raise UnsupportedFeatureError(
            f"The loss uses parameter {name!r} outside of the `forward` of the unit that owns it, where each rank has"
            f" only a part of it, for example in a penalty on weights. Compute the penalty in that `forward`, use the"
            f' `weight_decay` of the optimiser, or strategy="hetero_ddp".'
        )

    if part.is_floating_point() or part.is_complex():
        hook_on(part, Tensor.register_hook, refuse)
