"""Read, set aside and add up gradients outside DDP, and keep buffers unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_hetero.distributed.torch_private import queue_after_all_reduce, version_of, without_tensor_hooks

__all__ = [
    "Gradients",
    "accumulate_as_backward",
    "added",
    "kept_buffers",
    "mark",
    "muted_gradients",
    "put_back",
    "taken_aside",
]

Gradients = list[tuple[nn.Parameter, Tensor]]


@contextmanager
def taken_aside(parameters: Sequence[nn.Parameter]) -> Iterator[Gradients]:
    """Collect the gradients that this context computes in a list, and restore the earlier ones afterwards.

    If the context ends in an error, nothing is collected.
    """
    before = [(p, p.grad) for p in parameters]
    for parameter, _ in before:
        parameter.grad = None
    found: Gradients = []
    try:
        yield found
        found += [(p, p.grad) for p, _ in before if p.grad is not None]
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def put_back(gradients: Gradients) -> None:
    """Add gradients that were taken aside to those of the parameters."""
    for parameter, gradient in gradients:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, computed in the memory of the first; None stands for no gradient."""
    if old is None or new is None:
        return new if old is None else old
    return old.add_(new)


def mark(parameter: nn.Parameter) -> tuple[int, int] | None:
    """Return a value that changes as soon as a gradient is accumulated."""
    gradient = parameter.grad
    return None if gradient is None else (id(gradient), version_of(gradient))


def accumulate_as_backward(gradients: Gradients, reduced_after: Any = None) -> None:
    """Accumulate ``gradients`` as an interrupted backward pass would have done, including DDP's hooks.

    Args:
        gradients: Gradients to accumulate, at least one.
        reduced_after: The DDP module, if it was about to combine gradients after the interrupted backward pass;
            torch has dropped that callback together with the pass.
    """
    parameters, values = zip(*gradients, strict=True)

    def combine(_: Tensor) -> None:
        queue_after_all_reduce(reduced_after)

    # the user's hooks have seen these gradients
    with without_tensor_hooks(parameters):
        handle = parameters[0].register_hook(combine) if reduced_after is not None else None
        torch.autograd.backward(parameters, values)
        if handle is not None:
            handle.remove()


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Restore all buffers afterwards: the samples of this context must not change running statistics."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


@contextmanager
def muted_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Replace every gradient computed in this context by zeros before it is accumulated or communicated.

    Multiplying the loss by zero is not enough: zero times infinity is not a number.
    """
    handles: list[RemovableHandle] = [p.register_hook(_zeros) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(gradient: Tensor | None) -> Tensor | None:
    # synchronised batch normalisation has no gradient on a rank without samples, and no hook may give it one
    return None if gradient is None else torch.zeros_like(gradient)
