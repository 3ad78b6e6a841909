"""Give a tensor of a module other values or memory elsewhere: whatever refers to the tensor sees them there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["like", "set_value", "swap"]


def set_value(tensor: Tensor, value: Tensor) -> None:
    """Put ``value`` in the place of a tensor's values; it may be on another device."""
    try:
        tensor.data = value
    except RuntimeError:  # tensors of some devices, such as XLA's, are of another kind than the host's
        swap(tensor, like(tensor, value))


def swap(tensor: Tensor, other: Tensor) -> None:
    """Give ``tensor`` the values and the memory of ``other``."""
    other.__dict__.update(tensor.__dict__)  # attributes that users set on a parameter stay with it
    torch.utils.swap_tensors(tensor, other)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return a copy of ``value`` as a parameter if ``tensor`` is one, and otherwise as a plain tensor."""
    value = value.clone()  # finished communication may still hold the tensor that it wrote to
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
