"""Find out by trying whether two ranks may share a layer: each then runs it for some of the micro-batches."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.distributed.pipeline.replay import Segment
from lightning_hetero.distributed.torch_private import hooks_of_module, version_of

__all__ = ["can_be_shared", "foreign_hook"]

_OF_MODULES = frozenset(vars(nn.Module()))


def can_be_shared(layer: nn.Module, forward: Callable[[], Sequence[Tensor]], tensors: Sequence[Tensor]) -> bool:
    """Return whether it makes no difference that two ranks run a layer, each for some of the micro-batches.

    It has no buffers, which follow the samples, and no hooks. It changes nothing that it keeps, and its gradients can
    be added up.

    Args:
        layer: The layer.
        forward: Function that runs the layer on a fresh input and returns the tensors of its output.
        tensors: Parameters and buffers of the layer. Parameters have no gradients afterwards.
    """
    # the tensors of a segment itself are those that every rank has
    parts = [part for part in layer.modules() if not isinstance(part, Segment)]
    if any(True for part in parts for _ in part.buffers(recurse=False)) or foreign_hook(layer) is not None:
        return False
    try:
        kept: list[Any] = []  # no other object gets the identity of one of these
        before = _digest(parts, kept)
        outputs = [t for t in forward() if t.requires_grad and t.grad_fn is not None]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        return before == _digest(parts, kept) and all(t.grad is None or t.grad.layout is torch.strided for t in tensors)
    except Exception:  # what it keeps may be anything
        return False
    finally:
        for tensor in tensors:
            tensor.grad = None


def foreign_hook(layer: nn.Module) -> str | None:
    """Return the name of a hook that somebody has registered on a layer or within it; None if there is none.

    Hooks of this package do not mind on which rank a layer runs.
    """
    for part in layer.modules():
        for hook in hooks_of_module(part):
            if not str(getattr(hook, "__module__", "")).startswith("lightning_hetero"):
                return getattr(hook, "__qualname__", type(hook).__name__)
    return None


def _digest(parts: Sequence[nn.Module], kept: list[Any]) -> bytes:
    """Return a digest of all that modules keep in attributes, with the versions of tensors."""
    found = io.BytesIO()
    values = [
        {name: value for name, value in vars(part).items() if name not in _OF_MODULES or name == "training"}
        for part in parts
    ]
    _Pickler(found, kept).dump(values)
    return found.getvalue()


class _Pickler(pickle.Pickler):
    """Writes tensors, modules and functions by their identity.

    Args:
        file: Where to write.
        kept: Keeps what was written.
    """

    def __init__(self, file: io.BytesIO, kept: list[Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_id(self, value: Any) -> Any:
        """Return what stands for an object; None if it is written as usual."""
        if isinstance(value, Tensor):
            self._kept.append(value)
            return id(value), 0 if value.is_inference() else version_of(value)
        if isinstance(value, nn.Module | FunctionType | MethodType | BuiltinFunctionType):
            self._kept.append(value)
            return (id(value.__self__), value.__name__) if isinstance(value, MethodType) else id(value)
        return None
