"""Count what a forward pass keeps for its backward pass, on the meta device: without computing or allocating it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_hetero.distributed.random_state import random_state, restore_random_state
from lightning_hetero.distributed.torch_private import memory_of

__all__ = ["activations_of_example"]

_log = logging.getLogger(__name__)


def activations_of_example(
    module: nn.Module, example: Any, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> tuple[float, int] | None:
    """Return the memory of the activations of an example, and its number of samples; None if they are not found.

    Args:
        module: The module; its parameters may be anywhere, and stay as they are.
        example: Arguments of its ``forward``: a tensor, a tuple or list of them, or a mapping of names.
        context: Returns the context in which its ``forward`` runs, for example autocast.
    """
    rows = [leaf.shape[0] for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    if not rows or not rows[0]:
        return None
    own = dict(module.named_parameters())
    meta: dict[str, Tensor] = {name: p.detach().to("meta").requires_grad_(p.requires_grad) for name, p in own.items()}
    meta |= {name: buffer.detach().to("meta") for name, buffer in module.named_buffers()}
    found = _Saved({memory_of(tensor) for tensor in meta.values()})
    inputs = tree_map(lambda leaf: leaf.detach().to("meta") if isinstance(leaf, Tensor) else leaf, example)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    hooks = torch.autograd.graph.saved_tensors_hooks(found.pack, lambda tensor: tensor)
    before = random_state(None)
    try:
        with torch.enable_grad(), context(), hooks:
            torch.func.functional_call(module, meta, args, kwargs)
    except Exception:  # whatever a user's module does that the meta device cannot
        _log.debug("the activations of `example_input_array` could not be counted", exc_info=True)
        return None
    finally:
        restore_random_state(None, before)
    return float(found.size), rows[0]


class _Saved:
    """What autograd saves, each piece of memory once.

    Args:
        known: Memory that does not count.
    """

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._alive: list[Tensor] = []  # so that no number is used twice
        self.size = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is saved."""
        key = memory_of(tensor)
        if key not in self._known:
            self._known.add(key)
            self._alive.append(tensor)
            self.size += tensor.untyped_storage().nbytes()
        return tensor
