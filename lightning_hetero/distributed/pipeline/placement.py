"""Place the tensors of a model on the ranks over which its layers are split.

A tensor that lives on another rank keeps its name, shape and identity, but has no memory here.  So optimisers and
checkpoints see the names, order and groups of parameters of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.distributed.collectives import all_gather, all_wait
from lightning_hetero.distributed.host_group import host_group, host_timeout
from lightning_hetero.distributed.in_place import like, set_value, swap
from lightning_hetero.distributed.pipeline.moving import (
    Parcel,
    Unpacked,
    device_for_copies,
    pack,
    receive,
    send,
    state_on,
    why_not_moved,
)
from lightning_hetero.distributed.pipeline.passes.copies import Copies
from lightning_hetero.distributed.pipeline.passes.values import copy_on_host, empty_on_host, equalise

__all__ = ["Plan", "TensorPlacement", "gather_on_rank_zero"]

Plan = StagePlan | ReplicaPlan


class TensorPlacement:
    """Keeps on this rank the tensors that its stage needs.

    Parameters that are in no layer belong to the last stage, where losses are computed. Every rank has the buffers that
    are in no layer. A tensor that several layers share lives on every rank that has one of these layers, and those of a
    layer that two stages or several replicas share live on all their ranks.

    Args:
        module: The whole model; at first every rank has all of it.
        layers: Layers of the model, in order.
        plan: The stages, or the replicas and their stages.
        device: Device on which this rank computes.

    Attributes:
        plan: The stages, or the replicas and their stages.
        tied: Parameters of this rank that several layers have on several ranks, and the groups of these ranks.
        copies: Parameters of this rank in layers that two stages share.
        replicated: With replicas, all parameters of this rank that other ranks have too, in the place of the above.
    """

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module], plan: Plan, device: torch.device) -> None:
        self._module = module
        self._layers = list(layers)
        self._device = device
        self._rank = dist.get_rank()
        self._owners: dict[int, tuple[int, ...]] = {}
        self._everywhere: set[int] = set()  # identities of buffers that are in no layer
        self._is_complete = False
        self.tied: list[tuple[nn.Parameter, Any]] = []
        self.copies: list[Copies] = []
        self.replicated: list[Copies] = []
        self._groups: dict[tuple[int, ...], Any] = {}
        self._set_owners(plan)
        foreign = []
        for tensor in self._tensors():
            if self.owns(tensor):
                set_value(tensor, tensor.data.to(device))
            else:  # on the device for now, because nothing moves from "meta"
                foreign.append((tensor, _without_memory(tensor)))
                swap(tensor, like(tensor, torch.empty(0, dtype=tensor.dtype, device=device)))
        # What moves with a module is not only its tensors: metrics have states, and users write `_apply` themselves.
        module.to(device)
        for tensor, without_memory in foreign:
            swap(tensor, without_memory)
        for tensor in self._tensors():  # without a seed, ranks begin with different values
            owners = self._owners[id(tensor)]
            if len(owners) > 1 and (self.has_replicas or isinstance(tensor, nn.Parameter)):
                equalise(tensor, owners)

    def _set_owners(self, plan: Plan) -> None:
        self.plan = plan
        self._owners = self._owners_of_tensors(plan)
        self.tied = []
        shared = {id(p) for i in plan.shared for p in self._layers[i].parameters()}
        copied: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for tensor in self._tensors():
            owners = self._owners[id(tensor)]
            if isinstance(tensor, nn.Parameter) and len(owners) > 1:
                if owners not in self._groups:
                    # every rank must call this
                    self._groups[owners] = dist.new_group(list(owners), timeout=host_timeout())
                if id(tensor) in shared or self.has_replicas:
                    copied.setdefault(owners, []).append(tensor)
                elif self._rank in owners:
                    self.tied.append((tensor, self._groups[owners]))
        copies = [
            Copies(parameters, owners, self._groups[owners])
            for owners, parameters in copied.items()
            if self._rank in owners
        ]
        self.copies, self.replicated = ([], copies) if self.has_replicas else (copies, [])

    def _owners_of_tensors(self, plan: Plan) -> dict[int, tuple[int, ...]]:
        """Return the ranks of each tensor that the module has now, by its identity: a step may replace a buffer."""
        ranks_of: dict[int, set[int]] = {}
        for i, layer in enumerate(self._layers):
            owners = plan.owners_of(i)
            for tensor in (*layer.parameters(), *layer.buffers()):
                ranks_of.setdefault(id(tensor), set()).update(owners)
        self._everywhere = {id(buffer) for buffer in self._module.buffers()} - ranks_of.keys()
        ranks_of |= {key: {*range(plan.world_size)} for key in self._everywhere}
        return {id(t): tuple(sorted(ranks_of.get(id(t), plan.last_ranks))) for t in self._tensors()}

    def divide(self, plan: Plan) -> None:
        """Note a plan that differs in nothing but the shares of replicas."""
        self.plan = plan

    @property
    def has_replicas(self) -> bool:
        """Whether several pipelines have the layers."""
        return len(self.plan.last_ranks) > 1

    @property
    def own_layers(self) -> list[nn.Module]:
        """The layers of this rank's stages."""
        return [self._layers[i] for i in self.plan.layers_of(self._rank)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters that live on this rank."""
        return [p for p in self._module.parameters() if p.requires_grad and self.owns(p)]

    def owns(self, tensor: Tensor) -> bool:
        """Return whether a parameter or buffer of the module lives on this rank."""
        return self._rank in self._owners_of(tensor)

    def counts(self, parameter: nn.Parameter) -> bool:
        """Return whether this rank is the one that counts ``parameter`` in a sum over all ranks."""
        return self._source(parameter) == self._rank

    def is_shared(self, buffer: Tensor) -> bool:
        """Return whether a buffer of the module is in no layer, so that every rank has it."""
        return id(buffer) in self._everywhere or id(buffer) not in self._owners

    def is_outside_layers(self, parameter: Tensor) -> bool:
        """Return whether a parameter of the module is in no layer."""
        return all(parameter is not own for layer in self._layers for own in layer.parameters())

    def ranks_of_modules(self) -> dict[str, int]:
        """Return the rank that runs each submodule of the layers, by the submodule's name in the module.

        Of replicas, it is a rank of the first one.
        """
        rank_of: dict[int, int] = {}
        for i, layer in enumerate(self._layers):
            for part in layer.modules():
                rank_of.setdefault(id(part), self.plan.runner_of(i))
        return {name: rank_of[id(part)] for name, part in self._module.named_modules() if id(part) in rank_of}

    @contextmanager
    def whole(self, *, gradients: bool) -> Iterator[None]:
        """Give every rank copies of the tensors of other ranks in this context.

        They are on the rank's device if it has much more free memory than they take, and on its host otherwise. What is
        changed in the copies is dropped: it counts only on the rank that a tensor lives on. Every rank must enter at
        the same point.

        Args:
            gradients: Whether parameters get their gradients too.
        """
        foreign: list[Tensor] = []
        with torch.inference_mode(False):
            self._owners = self._owners_of_tensors(self.plan)
            tensors = [] if self._is_complete else list(self._tensors())
            has_gradient = all_gather([gradients and self.owns(t) and t.grad is not None for t in tensors])
            device = device_for_copies(self._device, [t for t in tensors if t.is_meta], gradients=gradients)
            for number, tensor in enumerate(tensors):
                is_foreign, source = tensor.is_meta, self._source(tensor)
                copy = self._broadcast(tensor)
                if is_foreign:
                    swap(tensor, like(tensor, copy.to(device)))
                    foreign.append(tensor)
                if has_gradient[source][number]:
                    gradient = empty_on_host(tensor) if is_foreign else copy_on_host(_gradient_of(tensor))
                    dist.broadcast(gradient, src=source, group=host_group())
                    if is_foreign:
                        tensor.grad = gradient.to(device)
        try:
            yield
        finally:
            with torch.inference_mode(False):
                for tensor in foreign:
                    tensor.grad = None
                    swap(tensor, _without_memory(tensor))

    def broadcast_layer(self, number: int) -> dict[str, Tensor]:
        """Return copies of a layer's parameters and buffers on every rank; every rank must call this at the same point.

        Changing the copies does not change the layer.
        """
        layer = self._layers[number]
        copies: dict[str, Tensor] = {}
        for name, tensor in _named(layer):
            copy = self._broadcast(tensor).to(self._device)
            copies[name] = _parameter_like(tensor, copy)
        return copies

    def broadcast_all(self, rank: int) -> dict[str, Tensor]:
        """Return all parameters and buffers on ``rank``, and an empty dict elsewhere; every rank must call this.

        Those of other ranks are copies.
        """
        self._owners = self._owners_of_tensors(self.plan)
        copies: dict[int, Tensor] = {}
        for tensor in self._tensors():
            copy = self._broadcast(tensor)
            if self._rank == rank:
                copies[id(tensor)] = _parameter_like(tensor, copy.to(self._device)) if tensor.is_meta else tensor
            del copy
        return {name: copies[id(tensor)] for name, tensor in _named(self._module)} if self._rank == rank else {}

    def why_not_moved(self, plan: Plan, optimizers: Sequence[Optimizer]) -> str | None:
        """Return why this rank cannot change to other stages during a training without a trace; None if it can."""
        before, after = self._owners_of_tensors(self.plan), self._owners_of_tensors(plan)
        moved = [
            (name, tensor)
            for name, tensor in (*self._module.named_parameters(), *self._module.named_buffers())
            if before[id(tensor)] != after[id(tensor)] and self._rank in (*before[id(tensor)], *after[id(tensor)])
        ]
        return why_not_moved(moved, optimizers)

    def modules_of_layers(self, layers: Iterable[int]) -> set[str]:
        """Return the names in the module of what some layers consist of."""
        parts = {id(part) for i in layers for part in self._layers[i].modules()}
        return {name for name, part in self._module.named_modules() if id(part) in parts}

    def move(self, plan: Plan, optimizers: Sequence[Optimizer], layers: Sequence[nn.Module] | None = None) -> None:
        """Change to other stages: values and the state that optimisers keep for them move to their new ranks.

        Every rank must call this at the same point, between two steps.

        Args:
            plan: The new stages.
            optimizers: The optimisers.
            layers: The layers in a new order; None if it is the same.
        """
        tensors, had_replicas, nearest = list(self._tensors()), self.has_replicas, self.plan.nearest
        before = self._owners_of_tensors(self.plan)
        if layers is not None:
            self._layers = list(layers)
        self._set_owners(plan)
        moves = [
            (tensor, old, new, [(nearest(old, rank), rank) for rank in new if rank not in old])
            for tensor in tensors
            for old, new in [(before[id(tensor)], self._owners[id(tensor)])]
            if id(tensor) not in self._everywhere  # perhaps only since a step has replaced a buffer, on one rank
        ]
        # What leaves goes first, so that no device holds more than its old stage or its new one.
        leaving: dict[int, Parcel] = {}
        for tensor, old, new, sent in moves:
            if self._rank in old and self._rank not in new:
                if self._rank in dict(sent):
                    leaving[id(tensor)] = pack(tensor, optimizers)
                for optimizer in optimizers:
                    optimizer.state.pop(tensor, None)
                swap(tensor, _without_memory(tensor))
        for tensor, _, _, sent in moves:
            parcel = leaving.pop(id(tensor), None)
            for source, target in sent:
                if self._rank == source:
                    parcel = parcel or pack(tensor, optimizers)
                    send(parcel, target)
                elif self._rank == target:
                    self._take(tensor, receive(source, tensor), optimizers)
        for tensor in tensors if self.has_replicas and not had_replicas else ():
            if id(tensor) in self._everywhere:  # only one rank has run whole steps with them
                equalise(tensor, self._owners[id(tensor)])

    def _take(self, tensor: Tensor, received: Unpacked, optimizers: Sequence[Optimizer]) -> None:
        swap(tensor, like(tensor, received.value.to(self._device)))
        if received.gradient is not None:
            tensor.grad = received.gradient.to(self._device)
        for optimizer, state in zip(optimizers, received.states, strict=True):
            if state:
                optimizer.state[tensor] = state_on(self._device, tensor, state, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the whole module on rank 0, and an empty dict elsewhere; every rank must call this."""
        if self._is_complete:
            return {name: _on_cpu(value) for name, value in self._module.state_dict().items()}
        others = {name for name, tensor in _named(self._module) if not self._is_told(tensor)}
        state = self._module.state_dict()
        own = {n: _on_cpu(value) for n, value in state.items() if n not in others and not _is_meta(value)}
        parts = gather_on_rank_zero(own)
        if parts is None:
            return {}
        merged = {name: value for part in reversed(parts) for name, value in part.items()}
        return {name: merged[name] for name in self._module.state_dict()}

    def _is_told(self, tensor: Tensor) -> bool:
        """Return whether this rank tells rank 0 the values of a tensor: with replicas, one of its owners does."""
        return not self.has_replicas or self._source(tensor) == self._rank

    def load(self, state_dict: dict[str, Any], *, strict: bool) -> None:
        """Load the tensors that live on this rank, and compare the names of all tensors.

        Raises:
            RuntimeError: If names are missing or unexpected, with torch's wording.
        """
        module = self._module
        own = {name for name, value in module.state_dict().items() if not _is_meta(value)}
        module.load_state_dict({name: value for name, value in state_dict.items() if name in own}, strict=False)
        missing = set(module.state_dict()) - set(state_dict)
        unexpected = set(state_dict) - set(module.state_dict())
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(module).__name__}: missing {sorted(missing)}, unexpected"
                f" {sorted(unexpected)}."
            )

    def complete(self) -> None:
        """Copy the parameters and buffers of all stages to every rank's CPU; every rank must call this."""
        self._owners = self._owners_of_tensors(self.plan)
        copy: Tensor | None = None
        for tensor in self._tensors():
            copy = None  # released before the next one takes memory
            copy = self._broadcast(tensor)
            if tensor.is_meta:
                swap(tensor, like(tensor, copy))
            else:
                set_value(tensor, tensor.data.cpu())
        self._is_complete = True
        # If a gloo thread is the last to release a tensor, it needs the interpreter, which may be shutting down then.
        all_wait()
        del copy

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor of the module in the memory of every rank's host."""
        copy = empty_on_host(tensor) if tensor.is_meta else copy_on_host(tensor)
        dist.broadcast(copy, src=self._source(tensor), group=host_group())
        return copy

    def _source(self, tensor: Tensor) -> int:
        return self._owners_of(tensor)[0]

    def _owners_of(self, tensor: Tensor) -> tuple[int, ...]:
        # An optimiser may train a tensor that is registered nowhere; only the loss can depend on it.
        return self._owners.get(id(tensor), self.plan.last_ranks)

    def _tensors(self) -> Iterator[Tensor]:
        """Yield each parameter and buffer once, in the same order on all ranks."""
        yield from self._module.parameters()
        yield from self._module.buffers()


def gather_on_rank_zero(value: Any) -> list[Any] | None:
    """Return the values of all ranks on rank 0, and None on other ranks."""
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, parts, dst=0, group=host_group())
    return parts


def _gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _without_memory(tensor: Tensor) -> Tensor:
    return like(tensor, torch.empty_like(tensor, device="meta"))


def _parameter_like(tensor: Tensor, copy: Tensor) -> Tensor:
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
