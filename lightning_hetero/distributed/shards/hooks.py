"""Notice when modules use the parameters of units, and when gradients have been computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_hetero.distributed.shards.released import hook_on
from lightning_hetero.distributed.shards.unit import Unit
from lightning_hetero.distributed.torch_private import source_of_cast, version_of

__all__ = ["SavedCasts", "UnitHooks", "UsesUnits", "tensors_in"]

_DEPTH = 3  # of objects in objects


class UsesUnits(Protocol):
    """What is told of the use of units."""

    def before_forward(self, unit: Unit) -> None:
        """Note that a module is about to use the parameters of a unit."""
        ...

    def after_forward(self, unit: Unit, output: Any) -> None:
        """Note that a module has used them, and what it has returned; None if it has failed."""
        ...

    def gradient_arrived(self, unit: Unit) -> None:
        """Note that the gradient of one of the parameters has been computed."""
        ...


class UnitHooks:
    """The hooks on the modules and parameters of all units.

    Args:
        units: The units; the first one is the root.
        user: What is told.
    """

    def __init__(self, units: Sequence[Unit], user: UsesUnits) -> None:
        self._handles: list[RemovableHandle] = []
        for unit in units:
            self._hook(unit, user, is_root=unit is units[0])

    def _hook(self, unit: Unit, user: UsesUnits, *, is_root: bool) -> None:
        # Plain functions, which a copy of the model shares with it; a copied engine would gather its own units.
        # A module that owns parameters may be called without the `forward` of the unit that it belongs to.
        modules = [*unit.owners] if is_root else [unit.module, *unit.owners]
        for module in {id(module): module for module in modules}.values():
            self._handles += [
                module.register_forward_pre_hook(lambda *_: user.before_forward(unit), prepend=True),
                module.register_forward_hook(lambda _m, _i, output: user.after_forward(unit, output), always_call=True),
            ]
        for leaf in unit.leaves:
            if leaf.is_floating_point() or leaf.is_complex():
                arrived = partial(_arrived, user, unit)
                self._handles.append(hook_on(leaf, Tensor.register_post_accumulate_grad_hook, arrived))

    def remove(self) -> None:
        """Leave the modules alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class SavedCasts:
    """Frees what autocast makes of parameters together with them: autograd keeps it until the backward pass.

    Args:
        units: The units; casts of the root stay.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._unit_of = {id(leaf): unit for unit in units[1:] for leaf in unit.leaves}

    def noticed(self) -> AbstractContextManager[Any]:
        """Return a context in which tensors are noticed that autograd saves."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        found = source_of_cast(tensor)
        if found is not None:
            base, leaf = found
            unit = self._unit_of.get(id(leaf))
            if unit is not None and unit.is_whole:
                unit.keep_cast(base, leaf)
        return tensor.detach(), version_of(tensor)


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if version_of(tensor) != version:  # torch does not look if there are hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation:"
            f" {tensor.dtype} {list(tensor.shape)}."
        )
    return tensor


def _arrived(user: UsesUnits, unit: Unit, _: Tensor) -> None:
    user.gradient_arrived(unit)


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """Yield the tensors in what a module has returned: also those in attributes of objects."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and not isinstance(leaf, nn.Module) and hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            yield from tensors_in([*vars(leaf).values()], depth - 1)
