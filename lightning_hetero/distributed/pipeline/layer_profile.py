"""Time every layer of a model on every rank, with a real micro-batch.

Each layer is timed alone, with inputs that carry no graph of the layers before it.  Measured like this, each layer's
part of the total is repeatable, and not distorted as it would be with hooks on a whole backward pass.  The layers are
copied to the ranks one after the other, so a rank holds at most one layer that is not its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.balance.pipeline.stages import LayerCosts
from lightning_hetero.balance.pipeline.typical_times import LayerRuns, PassSeconds, typical_times
from lightning_hetero.distributed.collectives import all_wait
from lightning_hetero.distributed.pipeline.borrowed import borrowed, state_kept
from lightning_hetero.distributed.pipeline.chain import LayerCalls
from lightning_hetero.distributed.pipeline.messages import as_outputs
from lightning_hetero.distributed.pipeline.passes.sharing import can_be_shared
from lightning_hetero.distributed.pipeline.passes.split_times import split_times
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.distributed.pipeline.structure import Call, flatten, mapped, tensors_of
from lightning_hetero.hardware.timed_call import timed_call

__all__ = ["LayerProfile", "costs_of", "moving_times_s", "profile_layers"]

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
        input_s: Seconds of the first part of each layer's backward pass if gradients of parameters are put off.
        weight_s: Seconds of the second part; 0 for layers that have to be run whole, and if that was not tried.
        can_be_shared: Whether two ranks may share each layer; False if that was not tried.
        copy_s: Seconds that it takes to copy each layer's parameters and buffers to other ranks.
        transfer_s: Seconds that it takes to transfer the tensors between two layers to another rank.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    parameter_bytes: tuple[int, ...]
    constant_bytes: tuple[int, ...]
    activations_bytes: tuple[int, ...]
    boundary_bytes: tuple[int, ...]
    input_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    can_be_shared: tuple[bool, ...]
    copy_s: tuple[float, ...]
    transfer_s: float

    def to_numbers(self) -> list[float]:
        """Return all values in one list, the transfer time last."""
        counts = (self.parameter_bytes, self.constant_bytes, self.activations_bytes, self.boundary_bytes)
        rows = (self.forward_s, self.backward_s, self.input_s, self.weight_s, self.copy_s, *counts, self.can_be_shared)
        return [*(value for row in rows for value in row), self.transfer_s]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> LayerProfile:
        """Return the profile that :meth:`to_numbers` has encoded."""
        *values, transfer_s = numbers
        n = len(values) // 10
        *seconds, a, b, c, d, shared = (tuple(values[i * n : (i + 1) * n]) for i in range(10))
        forward_s, backward_s, input_s, weight_s, copy_s = seconds
        parameters, constants, activations, boundaries = (tuple(int(value) for value in row) for row in (a, b, c, d))
        sizes = (parameters, constants, activations, boundaries)
        return cls(forward_s, backward_s, *sizes, input_s, weight_s, tuple(map(bool, shared)), copy_s, transfer_s)


def costs_of(profiles: Sequence[LayerProfile]) -> LayerCosts:
    """Return what each layer takes on each rank, given the profiles of all ranks."""
    return LayerCosts(
        tuple(p.forward_s for p in profiles),
        tuple(p.backward_s for p in profiles),
        tuple(p.input_s for p in profiles),
        tuple(p.weight_s for p in profiles),
    )


def moving_times_s(profiles: Sequence[LayerProfile], state_per_parameter: float) -> tuple[float, ...]:
    """Return the seconds that each layer takes to move, with its gradients and the state of its optimiser.

    Args:
        profiles: The profiles of all ranks.
        state_per_parameter: Number of values that the optimisers keep for each trained value.
    """
    of_layers = list(zip(profiles[0].parameter_bytes, profiles[0].constant_bytes, strict=True))
    more = [
        (trained * (2 + state_per_parameter) + constant) / max(trained + constant, 1) for trained, constant in of_layers
    ]
    # all ranks have copied a layer at the same time; the last of them has not waited
    copy_s = [min(profile.copy_s[layer] for profile in profiles) for layer in range(len(of_layers))]
    return tuple(seconds * max(times, 1.0) for seconds, times in zip(copy_s, more, strict=True))


@dataclass(frozen=True)
class _Timing:
    runs: LayerRuns
    kept_bytes: int
    shared_bytes: int


def profile_layers(
    placement: TensorPlacement,
    calls: LayerCalls,
    call: Call,
    loss_of: Callable[[Any], Tensor] | None,
    device: torch.device,
    *,
    split: bool = False,
    share: bool = False,
) -> LayerProfile:
    """Return the profile of this rank; every rank must call this at the same point.

    Nothing remains of the measurement: no gradient, no running statistic, no random number drawn, and nothing that a
    layer has kept in an attribute.

    Args:
        placement: Placement of the layers on the ranks.
        calls: All layers of the model and how they are called.
        call: Arguments of the model for one micro-batch, the same on every rank.
        loss_of: Function that returns the loss of a micro-batch, given the last layer's output; None on ranks that
            compute no loss, and if there is no loss.
        device: Device on which this rank computes.
        split: Whether to find out too which backward passes can be split.
        share: Whether to find out too which layers two ranks may share.
    """
    timings: list[_Timing] = []
    shared: list[bool] = []
    sizes: list[tuple[int, int]] = []
    boundaries: list[int] = []
    copy_s: list[float] = []
    value: Any = None
    cuda = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(cuda):
        for number, layer in enumerate(calls.layers):
            all_wait()  # what follows takes as long as the copying
            copies, seconds = timed_call(partial(placement.broadcast_layer, number), device)
            copy_s.append(seconds)
            with borrowed(layer, copies), state_kept(layer):
                layer_of_model = _Layer(calls, number, call, value)
                tensors = list(copies.values())
                timing, value = _timed_often(layer_of_model, tensors, device)
                two = split_times(layer, layer_of_model.made, tensors, device) if split else None
                if two is not None:
                    timing = replace(timing, runs=replace(timing.runs, input_s=two[0], weight_s=two[1]))
                shared.append(share and can_be_shared(layer, layer_of_model.made, tensors))
            timings.append(timing)
            sizes.append(_bytes_of(copies))
            del copies  # before the next layer takes memory
            torch.clear_autocast_cache()  # it keeps the layer and its cast
            boundaries.append(sum(t.numel() * t.element_size() for t in tensors_of(value)))
        if loss_of is not None:
            timings.append(_timed_often(_Loss(loss_of, value), [], device)[0])
            torch.clear_autocast_cache()
    times = typical_times([timing.runs for timing in timings])
    if loss_of is not None:  # belongs to the last layer
        tail, loss = timings.pop(), times.pop()
        last, before = timings[-1], times[-1]
        timings[-1] = _Timing(last.runs, last.kept_bytes + tail.kept_bytes, last.shared_bytes + tail.shared_bytes)
        times[-1] = PassSeconds(
            before.forward_s + loss.forward_s,
            before.backward_s + loss.backward_s,
            before.input_s + loss.input_s,
            before.weight_s,
        )
    return LayerProfile(
        forward_s=tuple(t.forward_s for t in times),
        backward_s=tuple(t.backward_s for t in times),
        parameter_bytes=tuple(trained for trained, _ in sizes),
        constant_bytes=tuple(n + t.shared_bytes for (_, n), t in zip(sizes, timings, strict=True)),
        activations_bytes=tuple(t.kept_bytes for t in timings),
        boundary_bytes=tuple(boundaries),
        input_s=tuple(t.input_s for t in times),
        weight_s=tuple(t.weight_s for t in times),
        can_be_shared=tuple(shared),
        copy_s=tuple(copy_s),
        transfer_s=_transfer_s(int(median(boundaries)), device),
    )


class _Part(Protocol):
    """A part of the model that is timed."""

    def fresh(self) -> Any:
        """Return an input that the part may change in place."""
        ...

    def forward(self, given: Any) -> tuple[Any, list[Tensor]]:
        """Return the output for a fresh input, and the tensors in it."""
        ...


class _Layer:
    def __init__(self, calls: LayerCalls, number: int, call: Call, value: Any) -> None:
        self._calls = calls
        self._number = number
        self._call = call
        self._value = value

    def fresh(self) -> tuple[Any, Call]:
        value = None if self._number == 0 else _given(self._value)
        return value, Call(mapped(self._call.args, _clone), mapped(self._call.kwargs, _clone))

    def forward(self, given: tuple[Any, Call]) -> tuple[Any, list[Tensor]]:
        output = self._calls.run(range(self._number, self._number + 1), *given)
        is_last = self._number == len(self._calls.layers) - 1
        # the output of a model may hold anything
        return output, tensors_of(output) if is_last else flatten(output)[0]

    def made(self) -> list[Tensor]:
        """Return the tensors of the output for a fresh input."""
        return self.forward(self.fresh())[1]


class _Loss:
    def __init__(self, loss_of: Callable[[Any], Tensor], value: Any) -> None:
        self._loss_of = loss_of
        self._value = value

    def fresh(self) -> Any:
        return _given(self._value)

    def forward(self, given: Any) -> tuple[Any, list[Tensor]]:
        loss = self._loss_of(given)
        return loss, [loss]


def _timed_often(part: _Part, copies: list[Tensor], device: torch.device) -> tuple[_Timing, Any]:
    """Return the times and an output; a first run warms up and shows which tensors are kept."""
    own = set(map(_storage, copies))
    kept, (_, made) = _kept(part, own)
    again = _kept(part, own)[0]
    # What two micro-batches keep is shared by all of a step: autocast casts a trained parameter once in a step, and
    # parameters of the loss are not those of a layer. The first is alive, so that no storage is used again.
    shared = {storage: kept[storage] for storage in kept.keys() & again.keys()}
    _backward(made, copies)
    del made
    forward_s: list[float] = []
    backward_s: list[float] = []
    begun_s = time.perf_counter()
    while len(forward_s) < _FEWEST_TIMES or (
        len(forward_s) < _MOST_TIMES and time.perf_counter() - begun_s < _ENOUGH_S
    ):
        given = part.fresh()
        (output, made), seconds = timed_call(lambda given=given: part.forward(given), device)  # type: ignore[misc]
        forward_s.append(seconds)
        backward_s.append(timed_call(lambda made=made: _backward(made, copies), device)[1])  # type: ignore[misc]
    shared_bytes = sum(shared.values())
    kept_bytes = sum(kept.values()) - shared_bytes
    return _Timing(LayerRuns(tuple(forward_s), tuple(backward_s)), kept_bytes, shared_bytes), _without_graph(output)


def _given(value: Any) -> Any:
    """Return a copy of an input, whose tensors are outputs of a function like those that a stage receives."""
    copies = {id(t): t.detach().clone() for t in tensors_of(value)}
    trained = [t for t in {id(t): t for t in tensors_of(value)}.values() if t.requires_grad]
    if trained:
        outputs = as_outputs([copies[id(t)] for t in trained], [None] * len(trained))
        copies |= {id(t): output for t, output in zip(trained, outputs, strict=True)}
    return mapped(value, lambda leaf: copies[id(leaf)] if isinstance(leaf, Tensor) else leaf)


def _clone(leaf: Any) -> Any:
    # outside inference mode, the clone of an inference tensor is an ordinary tensor
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _kept(part: _Part, own: set[int]) -> tuple[dict[int, int], tuple[Any, list[Tensor]]]:
    """Return the bytes of each storage that a forward pass keeps for its backward pass, and what it returns."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    given = part.fresh()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = part.forward(given)
    return kept, made


def _backward(made: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    # Not torch.autograd.grad, which layers do not support that are checkpointed with a nested backward pass.
    outputs = [t for t in made if t.requires_grad and t.grad_fn is not None]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    for copy in copies:
        copy.grad = None


def _without_graph(output: Any) -> Any:
    return mapped(output, lambda leaf: _like(leaf) if isinstance(leaf, Tensor) else leaf)


def _like(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


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
