"""Send a tensor of a model from one rank to another, with its gradient and what optimisers keep for it."""

from __future__ import annotations

import hashlib
import os
import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hetero.distributed.host_group import host_group
from lightning_hetero.distributed.torch_private import has_hooks, is_held_elsewhere
from lightning_hetero.hardware.memory import fits

__all__ = [
    "Parcel",
    "Unpacked",
    "device_for_copies",
    "digest_of_attributes",
    "pack",
    "receive",
    "send",
    "state_on",
    "why_not_moved",
]

_OF_OPTIMIZERS = ("state", "param_groups", "defaults")
_OF_MODULES = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, list, dict, set, Tensor)


@dataclass(frozen=True)
class _Number:
    """The position of a tensor among those of a parcel."""

    number: int


@dataclass(frozen=True)
class _Itself:
    """Stands for the tensor that is sent, where a state refers to it."""


@dataclass(frozen=True)
class Parcel:
    """A tensor and what belongs to it, in the memory of the host.

    Attributes:
        structure: Value, gradient and the state in each optimiser, with numbers in the place of tensors.
        tensors: The tensors.
    """

    structure: tuple[Any, Any, list[Any]]
    tensors: list[Tensor]


@dataclass(frozen=True)
class Unpacked:
    """What a parcel held.

    Attributes:
        value: The values of the tensor.
        gradient: Its gradient; None if it has none.
        states: Its state in each optimiser; empty where there is none.
    """

    value: Tensor
    gradient: Tensor | None
    states: list[Any]


def pack(tensor: Tensor, optimizers: Sequence[Optimizer]) -> Parcel:
    """Return a parcel of a tensor of the module; on a processor, it shares the tensor's memory."""
    tensors: list[Tensor] = []
    numbers: dict[int, _Number] = {}

    def numbered(leaf: Tensor, _: Any) -> Any:
        if leaf is tensor and tensors:
            return _Itself()
        if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout is not torch.strided or leaf.is_quantized:
            return leaf.detach().cpu()
        if id(leaf) not in numbers:
            numbers[id(leaf)] = _Number(len(tensors))
            tensors.append(leaf.detach().to("cpu"))
        return numbers[id(leaf)]

    value = numbered(tensor, None)
    gradient = None if tensor.grad is None else numbered(tensor.grad, None)
    states = [_each(dict(o.state[tensor]) if tensor in o.state else {}, numbered) for o in optimizers]
    return Parcel((value, gradient, states), tensors)


def send(parcel: Parcel, target: int) -> None:
    """Send a parcel to rank ``target``, which must call :func:`receive` at the same point."""
    described = [(tuple(t.shape), t.stride(), t.dtype) for t in parcel.tensors]
    dist.send_object_list([(parcel.structure, described)], dst=target, group=host_group())
    for tensor in parcel.tensors:
        if tensor.numel():
            dist.send(tensor.contiguous(), dst=target, group=host_group())


def receive(source: int, tensor: Tensor) -> Unpacked:
    """Return what rank ``source`` sends, in the memory of the host.

    Args:
        source: Rank that calls :func:`send` at the same point.
        tensor: The tensor as which it arrives.
    """
    received: list[Any] = [None]
    dist.recv_object_list(received, src=source, group=host_group())
    (value, gradient, states), described = received[0]
    tensors = [_received(source, *one) for one in described]

    def unpacked(leaf: Any) -> Any:
        if isinstance(leaf, _Number):
            return tensors[leaf.number]
        return tensor if isinstance(leaf, _Itself) else leaf

    return Unpacked(unpacked(value), unpacked(gradient), [_mapped(state, unpacked) for state in states])


def _received(source: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    dense = torch.empty(shape, dtype=dtype, device="cpu")
    if dense.numel():
        dist.recv(dense, src=source, group=host_group())
    if stride == dense.stride() or any(step == 0 for step in stride):
        return dense
    return torch.empty_strided(shape, stride, dtype=dtype, device="cpu").copy_(dense)


def device_for_copies(device: torch.device, copied: Iterable[Tensor], *, gradients: bool) -> torch.device:
    """Return where copies are kept for a while: hooks compute with them and with what is on the device.

    Args:
        device: Device of this rank.
        copied: The tensors, as they are without memory.
        gradients: Whether their gradients are copied too.
    """
    size_bytes = sum(t.numel() * t.element_size() for t in copied) * (2 if gradients else 1)
    return device if fits(size_bytes, device) else torch.device("cpu")


def state_on(device: torch.device, parameter: Tensor, state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimiser's state of a parameter on the devices on which torch puts a state that it loads.

    That is the parameter's device, except for step counts, which only fused and capturable optimisers keep there.
    """
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    steps_on_device = group.get("fused") or group.get("capturable")
    memo: dict[int, Tensor] = {id(parameter): parameter}

    def placed(value: Tensor, key: Any) -> Tensor:
        if id(value) not in memo:
            memo[id(value)] = value if key == "step" and not steps_on_device else value.to(device)
        return memo[id(value)]

    moved = _each(state, placed)
    assert isinstance(moved, dict)
    return moved


def _each(value: Any, change: Callable[[Tensor, Any], Any], key: Any = None) -> Any:
    """Change every tensor in nested containers; ``change`` also gets the key under which it is kept."""
    if isinstance(value, Tensor):
        return change(value, key)
    if isinstance(value, dict):
        return {k: _each(v, change, k) for k, v in value.items()}
    return type(value)(_each(v, change, key) for v in value) if type(value) in (list, tuple) else value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return type(value)(_mapped(v, change) for v in value) if type(value) in (list, tuple) else change(value)


# ---- what cannot be moved --------------------------------------------------------------------------------------------


def why_not_moved(named: Iterable[tuple[str, Tensor]], optimizers: Sequence[Optimizer]) -> str | None:
    """Return why tensors cannot move between ranks during a training without a trace; None if they can.

    Args:
        named: Tensors of this rank that would move, and their names.
        optimizers: The optimisers, which have made steps.
    """
    for optimizer in optimizers:
        reason = _why_not_divided(optimizer)
        if reason is not None:
            return f"{type(optimizer).__name__} {reason}"
    for name, tensor in named:
        if isinstance(tensor, nn.Parameter) and has_hooks(tensor):
            return f"{name!r} has a hook on its gradient"
        if weakref.getweakrefcount(tensor):
            return f"something keeps a weak reference to {name!r}, as compiled layers do"
        if is_held_elsewhere(tensor):
            return f"something outside of Python holds {name!r}, as graphs of earlier steps do"
        if tensor.is_meta:  # it comes from another rank
            continue
        try:
            pickle.dumps(pack(tensor, optimizers).structure)
        except Exception as error:  # states may hold anything
            return f"what an optimiser keeps for {name!r} cannot be sent: {error}"
    return None


def _why_not_divided(optimizer: Optimizer) -> str | None:
    """Return what an optimiser keeps that does not belong to a single parameter."""
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    owners: dict[int, int] = {}
    for number, (key, state) in enumerate(optimizer.state.items()):
        if id(key) not in parameters:
            return f"keeps a state for {type(key).__name__!r}, which is none of its parameters"
        for tensor in _tensors_in(state):
            if owners.setdefault(id(tensor), number) != number:
                return "keeps one tensor for several parameters"
    for name, value in vars(optimizer).items():
        if name not in _OF_OPTIMIZERS and not callable(value) and any(True for _ in _tensors_in(value)):
            return f"keeps tensors in {name!r} and not in the states of its parameters"
    return None


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, dict):
        yield from (tensor for pair in value.items() for entry in pair for tensor in _tensors_in(entry))
    elif isinstance(value, list | tuple | set):
        yield from (tensor for entry in value for tensor in _tensors_in(entry))
    elif isinstance(value, Tensor):
        yield value


def digest_of_attributes(parts: Iterable[nn.Module]) -> bytes:
    """Return a digest of what modules keep in plain attributes; equal on two ranks if nothing has changed on either.

    Where that cannot be told, no two digests are equal.
    """
    kept = [
        {name: value for name, value in vars(part).items() if name not in _OF_MODULES and isinstance(value, _PLAIN)}
        for part in parts
    ]
    try:
        return hashlib.blake2b(pickle.dumps(_each(kept, lambda value, _: _contents(value)))).digest()
    except Exception:  # values may hold anything
        return os.urandom(16)


def _contents(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    numbers = tensor.detach().cpu().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), numbers.view(torch.uint8).numpy().tobytes()
