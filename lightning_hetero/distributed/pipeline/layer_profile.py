"""Time every layer of a model on every rank, with a real micro-batch.

Each layer is timed alone, with inputs that carry no graph of the layers before it.  Measured like this, each layer's
part of the total is repeatable, and not distorted as it would be with hooks on a whole backward pass.  The layers are
copied to the ranks one after the other, so a rank holds at most one layer that is not its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.distributed.pipeline.structure import flatten, unflatten
from lightning_hetero.hardware.timed_call import timed_call

__all__ = ["LayerProfile", "profile_layers"]

_FEWEST_TIMES, _MOST_TIMES = 3, 10
_ENOUGH_S = 0.05
_PINGS = 7


@dataclass(frozen=True)
class LayerProfile:
    """The time and memory that each layer takes on this rank's device for one micro-batch.

    Attributes:
        forward_s: Seconds of each layer's forward pass; the last one includes the loss on ranks that compute it.
        backward_s: Seconds of each layer's backward pass; the last one includes the loss on ranks that compute it.
        parameter_bytes: Bytes of each layer's trained parameters.
        constant_bytes: Bytes of each layer's other parameters and buffers, and of what its backward pass needs once for
            all micro-batches, such as autocast's casts of parameters.
        activations_bytes: Bytes that each layer keeps for the backward pass of each micro-batch.
        boundary_bytes: Bytes of each layer's output.
        transfer_s: Seconds that it takes to transfer the tensors between two layers to another rank.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    parameter_bytes: tuple[int, ...]
    constant_bytes: tuple[int, ...]
    activations_bytes: tuple[int, ...]
    boundary_bytes: tuple[int, ...]
    transfer_s: float

    def to_numbers(self) -> list[float]:
        """Return all values in one list, the transfer time last."""
        counts = (self.parameter_bytes, self.constant_bytes, self.activations_bytes, self.boundary_bytes)
        return [*(value for row in (self.forward_s, self.backward_s, *counts) for value in row), self.transfer_s]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> LayerProfile:
        """Return the profile that :meth:`to_numbers` has encoded."""
        *values, transfer_s = numbers
        n = len(values) // 6
        forward_s, backward_s, *counts = (tuple(values[i * n : (i + 1) * n]) for i in range(6))
        parameters, constants, activations, boundaries = (tuple(int(value) for value in row) for row in counts)
        return cls(forward_s, backward_s, parameters, constants, activations, boundaries, transfer_s)


@dataclass(frozen=True)
class _Timing:
    forward_s: float
    backward_s: float
    kept_bytes: int
    shared_bytes: int


def profile_layers(
    placement: TensorPlacement,
    layers: Sequence[nn.Module],
    inputs: tuple[Any, ...],
    loss_of: Callable[[Any], Tensor] | None,
    device: torch.device,
) -> LayerProfile:
    """Return the profile of this rank; every rank must call this at the same point.

    Nothing remains of the measurement: no gradient, no running statistic, no random number drawn.

    Args:
        placement: Placement of the layers on the ranks.
        layers: All layers of the model, in order.
        inputs: Arguments of the first layer, the same on every rank.
        loss_of: Function that returns the loss of a micro-batch, given the last layer's output; None on ranks that
            compute no loss, and if there is no loss.
        device: Device on which this rank computes.
    """
    timings: list[_Timing] = []
    sizes: list[tuple[int, int]] = []
    boundaries: list[int] = []
    value: Any = inputs
    cuda = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda):
        for number, layer in enumerate(layers):
            copies = placement.broadcast_layer(number)
            timing, value = _timed(layer, copies, value, device, first=number == 0)
            timings.append(timing)
            sizes.append(_bytes_of(copies))
            del copies  # before the next layer takes memory
            torch.clear_autocast_cache()  # it keeps the layer and its cast
            boundaries.append(sum(t.numel() * t.element_size() for t in flatten(value)[0]))
        if loss_of is not None:
            tail = _timed_loss(loss_of, value, device)
            last = timings[-1]
            timings[-1] = _Timing(
                last.forward_s + tail.forward_s,
                last.backward_s + tail.backward_s,
                last.kept_bytes + tail.kept_bytes,
                last.shared_bytes + tail.shared_bytes,
            )
            torch.clear_autocast_cache()
    return LayerProfile(
        forward_s=tuple(t.forward_s for t in timings),
        backward_s=tuple(t.backward_s for t in timings),
        parameter_bytes=tuple(trained for trained, _ in sizes),
        constant_bytes=tuple(n + t.shared_bytes for (_, n), t in zip(sizes, timings, strict=True)),
        activations_bytes=tuple(t.kept_bytes for t in timings),
        boundary_bytes=tuple(boundaries),
        transfer_s=_transfer_s(int(median(boundaries)), device),
    )


def _timed(
    layer: nn.Module, copies: dict[str, Tensor], value: Any, device: torch.device, *, first: bool
) -> tuple[_Timing, Any]:
    tensors, structure = flatten(value)

    def forward() -> tuple[list[Tensor], Any, Any]:
        given = [t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors]
        value = unflatten(given, structure)
        output = functional_call(layer, copies, value if first else (value,))
        return [*given, *copies.values()], output, flatten(output)[0]

    return _timed_often(forward, device, set(map(_storage, copies.values())))


def _timed_loss(loss_of: Callable[[Any], Tensor], value: Any, device: torch.device) -> _Timing:
    tensors, structure = flatten(value)

    def forward() -> tuple[list[Tensor], Any, Any]:
        given = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        loss = loss_of(unflatten(given, structure))
        return given, loss, [loss]

    return _timed_often(forward, device, set())[0]


_Made = tuple[list[Tensor], Any, list[Tensor]]
_Forward = Callable[[], _Made]


def _timed_often(forward: _Forward, device: torch.device, own: set[int]) -> tuple[_Timing, Any]:
    """Return the median times and an output; a first run warms up and shows which tensors are kept."""
    kept, (leaves, _, made) = _kept(forward, own)
    shared = _shared(forward, kept, leaves)
    _backward(leaves, made)
    forward_s: list[float] = []
    backward_s: list[float] = []
    begun_s = time.perf_counter()
    while len(forward_s) < _FEWEST_TIMES or (
        len(forward_s) < _MOST_TIMES and time.perf_counter() - begun_s < _ENOUGH_S
    ):
        (leaves, output, made), seconds = timed_call(forward, device)
        forward_s.append(seconds)
        backward_s.append(timed_call(lambda leaves=leaves, made=made: _backward(leaves, made), device)[1])  # type: ignore[misc]
    shared_bytes = sum(shared.values())
    kept_bytes = sum(kept.values()) - shared_bytes
    return _Timing(median(forward_s), median(backward_s), kept_bytes, shared_bytes), _without_graph(output)


def _kept(forward: _Forward, own: set[int]) -> tuple[dict[int, int], _Made]:
    """Return the bytes of each storage that a forward pass keeps for its backward pass, and what it returns."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = forward()
    return kept, made


def _shared(forward: _Forward, kept: dict[int, int], leaves: Sequence[Tensor]) -> dict[int, int]:
    """Return those of the storages ``kept`` that all micro-batches of a step share: a second one keeps them as well.

    Autocast casts a trained parameter once in a step, and parameters of the loss are not those of a layer. What was
    kept must be alive, so that no storage is used again. Inputs are the same here, but not in a step.
    """
    own = set(map(_storage, leaves))
    return {storage: kept[storage] for storage in kept.keys() & _kept(forward, own)[0].keys() if storage not in own}


def _backward(leaves: Sequence[Tensor], made: Sequence[Tensor]) -> None:
    outputs = [t for t in made if t.requires_grad]
    inputs = [t for t in leaves if t.requires_grad]
    if outputs and inputs:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _without_graph(output: Any) -> Any:
    tensors, structure = flatten(output)
    return unflatten([t.detach().requires_grad_(t.requires_grad) for t in tensors], structure)


def _bytes_of(copies: dict[str, Tensor]) -> tuple[int, int]:
    """Return the bytes of trained parameters and of everything else."""
    sizes = [(t.requires_grad, t.numel() * t.element_size()) for t in copies.values()]
    return sum(n for trained, n in sizes if trained), sum(n for trained, n in sizes if not trained)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _transfer_s(size_bytes: int, device: torch.device) -> float:
    """Return the seconds that a message takes between ranks 0 and 1, as measured by each; 0 on other ranks."""
    rank = dist.get_rank()
    if dist.get_world_size() == 1 or rank > 1:
        return 0.0
    message = torch.zeros(max(size_bytes, 1), dtype=torch.uint8, device=device)

    def there_and_back() -> None:
        for sender in (0, 1):
            if rank == sender:
                dist.send(message, dst=1 - rank)
            else:
                dist.recv(message, src=1 - rank)

    return median(timed_call(there_and_back, device)[1] for _ in range(_PINGS)) / 2
