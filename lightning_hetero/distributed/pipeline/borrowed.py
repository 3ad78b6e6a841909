"""Run layers with copies of their tensors, and leave no trace of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["borrowed", "buffers_kept", "changed_attributes", "evaluating", "state_kept"]

# Attributes of every module; what a module itself keeps is in others.
_OF_MODULES = frozenset(vars(nn.Module()))


@contextmanager
def borrowed(module: nn.Module, copies: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a module other parameters and buffers in this context.

    ``torch.func.functional_call`` would do so for a forward pass only, and a checkpointed layer computes again in its
    backward pass.

    Args:
        module: The module.
        copies: Parameters and buffers by their names, those that have several names under each of them.
    """
    places: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, copy in copies.items():
            path, _, attribute = name.rpartition(".")
            owner: nn.Module = module.get_submodule(path)
            registered: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for tensors in registered:
                if attribute in tensors:
                    places.append((tensors, attribute, tensors[attribute]))
                    tensors[attribute] = copy
        yield
    finally:
        for tensors, attribute, before in reversed(places):
            tensors[attribute] = before


@contextmanager
def state_kept(*modules: nn.Module) -> Iterator[None]:
    """Restore what modules keep in attributes, also in lists, dicts and sets, after this context."""
    before = [(module, _attributes(module)) for root in modules for module in root.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            kept = vars(module)
            for name in [name for name in kept if name not in _OF_MODULES and name not in attributes]:
                del kept[name]
            for name, (value, content) in attributes.items():
                kept[name] = value
                if isinstance(value, list):
                    value[:] = content
                elif content is not None:
                    value.clear()
                    value.update(content)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, type(value)(value) if type(value) in (list, dict, set) else None)
        for name, value in vars(module).items()
        if name not in _OF_MODULES
    }


@contextmanager
def changed_attributes(modules: Sequence[nn.Module]) -> Iterator[list[str]]:
    """Collect the names of attributes that hold other tensors or numbers after this context than before."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    before = [(part, _attributes(part)) for part in parts]
    found: list[str] = []
    yield found
    for part, attributes in before:
        for name, (value, content) in _attributes(part).items():
            old, old_content = attributes.get(name, (None, None))
            kept = isinstance(value, Tensor | int | float) and value is not old
            if kept and not isinstance(value, Tensor) and value == old:
                continue
            if kept or (content and content is not None and len(content) != len(old_content or ())):
                found.append(f"{type(part).__name__}.{name}")


@contextmanager
def buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the values of buffers after this context."""
    buffers = {id(b): b for module in modules for b in module.buffers() if not b.is_meta}.values()
    before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Switch off randomness and running statistics in this context."""
    training = [(module, module.training) for root in modules for module in root.modules()]
    for module, _ in training:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
