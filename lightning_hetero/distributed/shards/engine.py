"""Train a model whose parameters are in shards: gather units before they are used, and release them afterwards.

Hooks on the modules gather a unit before its ``forward`` and release it afterwards. In the backward pass, the gradient
of the output of any module that owns parameters gathers its unit again, and the last gradient of a unit starts to
reduce them. All ranks do so in one order (see :mod:`lightning_hetero.distributed.shards.order`). At most two units are
whole at a time, one in use and one gathered ahead, and besides them the root: the parameters outside of all units,
which are whole during a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_hetero.balance.shards.cuts import Cutter
from lightning_hetero.distributed.host_group import host_group
from lightning_hetero.distributed.shards.exchange import exchange_for
from lightning_hetero.distributed.shards.order import OrderOfUse
from lightning_hetero.distributed.shards.reductions import Reductions
from lightning_hetero.distributed.shards.unit import Unit
from lightning_hetero.distributed.shards.units import initialise, plan_units
from lightning_hetero.distributed.torch_private import current_backward_pass
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["ShardEngine"]

_MOST_WHOLE = 2


class ShardEngine:
    """The shards of one rank.

    Args:
        root: The model. Its parameters are replaced by parts, and moved to the device unit by unit.
        units: Modules whose parameters are whole together; none contains another.
        weights: One weight per rank, in proportion to which the ranks hold shards.
        device: Device of this rank.
        waiting: Returns a context in which this rank may wait for others.
        fail: Function that tells the peers why this rank fails.
        find_unused_parameters: Whether the ranks agree before each collective which unit comes next, and after each
            backward pass which parameters were used. Without it, all training steps use the units in the order of the
            first one, and every trained parameter must be used in every step on every rank.
        reshard_after_forward: Whether units are released between the forward and the backward pass.

    Attributes:
        units: The units; the first one is the root.
        most_whole_units: The largest number of units, besides the root, that were whole at a time.
        most_whole_bytes: The largest memory that whole parameters have taken.
        reduces: Whether backward passes reduce gradients; otherwise each rank accumulates its own, whole.
    """

    def __init__(
        self,
        root: nn.Module,
        units: Sequence[nn.Module],
        weights: Sequence[float],
        device: torch.device,
        *,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        fail: Callable[[str], None] = lambda _: None,
        find_unused_parameters: bool = False,
        reshard_after_forward: bool = True,
    ) -> None:
        # of its own: what the user's code exchanges must not come between
        self._group: Any = dist.new_group()
        rank = dist.get_rank()
        self._device, self._waiting, self._fail = device, waiting, fail
        self._find_unused = find_unused_parameters
        self._reshard = reshard_after_forward
        self._root_module = root
        exchange, cutter = exchange_for(device, self._group), Cutter(weights)
        planned = plan_units(root, units)
        self.units = [
            Unit(number, plan, cutter, rank, device, exchange)
            for number, plan in enumerate(planned)
            if number == 0 or plan.parameters
        ]
        for number, unit in enumerate(self.units):
            unit.number = number
        self._move_buffers()
        # from host to host, so that no host waits for its device
        hosts: Any = self._group if device.type == "cpu" else host_group()
        self._order = OrderOfUse(len(self.units), self, hosts, fail)
        self._reductions = Reductions(self.units, hosts, waiting)
        self._kind: str | None = None
        self._passes = 0
        self._in_backward = False
        self._muted = False
        self.reduces = True
        self.most_whole_units = 0
        self.most_whole_bytes = 0
        self._handles: list[RemovableHandle] = []
        for unit in self.units:
            self._hook(unit)

    def _move_buffers(self) -> None:
        for module in self._root_module.modules():
            own = dict(module.named_buffers(recurse=False))
            if any(buffer.is_meta for buffer in own.values()):
                initialise(module, [*own.values()], self._device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))
        self.synchronise_buffers()

    def synchronise_buffers(self) -> None:
        """Give all ranks the buffers of rank 0, as DDP does before each forward pass of a training."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._root_module.buffers():
            if buffer.numel():
                by_type.setdefault(buffer.dtype, []).append(buffer)
        with torch.no_grad(), self._waiting():
            for buffers in by_type.values():
                row = torch.cat([buffer.reshape(-1) for buffer in buffers])
                dist.broadcast(row.view(torch.uint8), 0, self._group)
                for buffer, value in zip(buffers, row.split([b.numel() for b in buffers]), strict=True):
                    buffer.copy_(value.view(buffer.shape))

    @property
    def root(self) -> Unit:
        """The unit of all parameters outside of units."""
        return self.units[0]

    @property
    def leaves(self) -> list[nn.Parameter]:
        """The user's parameters."""
        return [leaf for unit in self.units for leaf in unit.leaves]

    @property
    def shards(self) -> list[nn.Parameter]:
        """The parts that take the place of the user's parameters between steps."""
        return [shard for unit in self.units for shard in unit.shards]

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def _hook(self, unit: Unit) -> None:
        # Plain functions, which a copy of the model shares with it; a copied engine would gather its own units.
        if unit is not self.root:
            module = unit.module
            self._handles += [
                module.register_forward_pre_hook(lambda *_: self._before_forward(unit), prepend=True),
                module.register_forward_hook(lambda *_: self._after_forward(unit), always_call=True),
            ]
        else:
            for owner in unit.owners:
                self._handles.append(owner.register_forward_pre_hook(lambda *_: self._before_root(), prepend=True))
        for owner in {id(m): m for m in [unit.module, *unit.owners] if m is not self._root_module}.values():
            self._handles.append(owner.register_forward_hook(lambda _m, _i, out: self._watch(unit, out)))
        for leaf in unit.leaves:
            if leaf.is_floating_point() or leaf.is_complex():
                frozen = not leaf.requires_grad  # hooks need a parameter that may be trained later
                leaf.requires_grad_()
                self._handles.append(leaf.register_post_accumulate_grad_hook(lambda _: self._gradient_arrived(unit)))
                leaf.requires_grad_(not frozen)

    def _before_forward(self, unit: Unit) -> None:
        self._need(unit)
        unit.active += 1

    def _after_forward(self, unit: Unit) -> None:
        unit.active = max(unit.active - 1, 0)
        if current_backward_pass() != -1 or unit.active or not unit.is_whole:
            return  # a checkpointed forward pass is repeated in the backward pass, which follows
        if self._reshard or not torch.is_grad_enabled():
            self._release(unit)
            self._order.go_ahead()

    def _before_root(self) -> None:
        self._need(self.root)
        for flat in self.root.flats:
            flat.follow_freezing()

    def _watch(self, unit: Unit, output: Any) -> None:
        """Gather a unit when the gradient of an output of one of its modules has been computed."""
        if torch.is_grad_enabled() and self._kind is not None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(partial(self._before_backward, unit))

    def _before_backward(self, unit: Unit, _: Tensor) -> None:
        if self._reshard and not self._in_backward and torch.is_grad_enabled():
            self._refuse(
                "gradients of gradients (`create_graph=True`) need all parameters at the same time. Set"
                " HeteroFSDPStrategy(reshard_after_forward=False), which keeps them until the backward pass has ended"
            )
        self._need(unit)

    # ---- gather and release ------------------------------------------------------------------------------------------

    def _need(self, unit: Unit) -> None:
        if unit.is_whole:
            return
        if self._kind is None:
            raise UnsupportedFeatureError(
                "`hetero_fsdp`: the model is used outside of a step, where the ranks do not gather its parameters"
                " together. Use it in `training_step`, `validation_step`, `test_step` or `predict_step`."
            )
        if not unit.in_flight:
            if unit is not self.root:
                self._make_room(unit)
            self._order.gather(unit.number)
        with self._waiting():
            unit.finish_gathering()
        if unit is not self.root:
            self._make_room(unit)
        self._order.go_ahead()

    def _make_room(self, used: Unit) -> None:
        """Release units that are neither in use nor gathered ahead."""
        if not self._reshard:
            return
        for unit in self.units[1:]:
            if unit.is_whole and unit is not used and not unit.active:
                self._release(unit)

    def _release(self, unit: Unit) -> None:
        if unit.promised:
            unit.promised -= 1  # other ranks gather it again where this one keeps it
        else:
            unit.release()

    def start_gather(self, unit: int, *, needed: bool) -> None:
        """Start to gather a unit; see :class:`~lightning_hetero.distributed.shards.order.Collectives`."""
        target = self.units[unit]
        if target.is_whole or target.in_flight:
            with self._waiting():
                for flat in target.flats:
                    flat.wait()
                    flat.start_gathering()  # the same values again
                    flat.wait()
            target.promised += needed
            return
        target.start_gathering()
        self._note_memory()
        if not needed:
            with self._waiting():
                target.release()

    def _note_memory(self) -> None:
        live = [unit for unit in self.units if unit.is_whole or unit.in_flight]
        self.most_whole_units = max(self.most_whole_units, sum(unit is not self.root for unit in live))
        self.most_whole_bytes = max(self.most_whole_bytes, sum(unit.whole_bytes for unit in live))

    def may_gather_ahead(self) -> bool:
        """Return whether fewer than two units are whole or under way."""
        return not self._reshard or sum(unit.is_whole or unit.in_flight for unit in self.units[1:]) < _MOST_WHOLE

    def release_all(self) -> None:
        """Release every unit."""
        for unit in self.units:
            unit.promised = unit.active = 0
            if unit.is_whole or unit.in_flight:
                unit.release()

    # ---- passes ------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Let the model be used in this context, and after a training step until its backward pass has ended.

        Args:
            kind: What the step does. In "train" the order of units is fixed; in all others the ranks may use different
                units, and in "predict" the ranks may have different numbers of steps.
        """
        self.close()
        self._kind, self._passes = kind, 0
        self._begin("forward")
        self._need(self.root)
        yield
        if kind != "train":
            if kind != "predict":
                self.settle()
            self.release_all()
            self._kind = None

    def close(self) -> None:
        """End the last training step, if it has not ended; every rank must call this at the same point."""
        if self._kind == "train":
            self._order.finish()
        self._kind = None
        self.release_all()

    def settle(self) -> None:
        """Prepare for the ranks to communicate in a step; every rank must call this at the same point."""
        if self._kind is not None and not self._in_backward:
            with self._waiting():
                self._order.settle()

    def drain(self) -> None:
        """Take part in what other ranks need until all of them have ended their steps."""
        self._begin("end")
        self._order.finish()

    def _begin(self, name: str) -> None:
        fixed = self._kind == "train" and not self._find_unused
        key = (self._passes, name, self.reduces) if fixed else None
        self._order.begin(key, backward=name == "backward")

    @contextmanager
    def backward(self, *, partial_use: bool = False, muted: bool = False) -> Iterator[None]:
        """Run a backward pass in this context; afterwards the parts have their gradients.

        Args:
            partial_use: Whether the pass may leave parameters out on purpose.
            muted: Whether this rank has no sample, so that its gradients count as zero whatever they are, and the
                parameters as not used by it.
        """
        assert self._kind is not None
        self._order.finish()
        self._begin("backward")
        self._in_backward = True
        for unit in self.units:
            unit.arrived = 0
            unit.expected = unit.usual or sum(shard.requires_grad for shard in unit.shards)
            for flat in unit.flats:
                flat.begin_backward()
        self._order.go_ahead()
        self._muted = muted
        # a product with zero would not do: gradients may be infinite
        silenced = [leaf for leaf in self.leaves if leaf.requires_grad] if muted else []
        silencers = [leaf.register_hook(torch.zeros_like) for leaf in silenced]
        try:
            yield
            self._end_backward(partial_use)
        finally:
            self._in_backward = self._muted = False
            for silencer in silencers:
                silencer.remove()

    def _end_backward(self, partial_use: bool) -> None:
        if self.reduces:
            for unit in reversed(self.units):
                if unit.has_gradients:
                    if self._find_unused:  # some of its parameters are not used: next time it need not wait for them
                        unit.usual = unit.arrived
                    self._order.reduce(unit.number)
        with self._waiting():
            self._order.finish()
        self._reductions.finish()
        if self.reduces:
            if self._find_unused or partial_use:
                self._reductions.agree_on_used(muted=self._muted)
            self._check_complete(partial_use)
        self.release_all()
        self._passes += 1
        self._begin("forward")

    def _gradient_arrived(self, unit: Unit) -> None:
        if not self._in_backward:
            raise UnsupportedFeatureError(
                "`hetero_fsdp` must know when a backward pass ends, so gradients must be computed by Lightning. Use"
                " `self.manual_backward(loss)` instead of `loss.backward()`."
            )
        unit.arrived += 1
        if unit.arrived == unit.expected:
            unit.arrived = 0
            if self.reduces and unit is not self.root:
                self._order.reduce(unit.number)

    def start_reduce(self, unit: int) -> None:
        """Start to reduce a unit; see :class:`~lightning_hetero.distributed.shards.order.Collectives`."""
        self._reductions.start(self.units[unit], muted=self._muted)

    def _check_complete(self, partial_use: bool) -> None:
        if any(unit.has_gradients for unit in self.units):
            why = "gradients of a unit have come after it was reduced, as this rank uses units in another order"
        elif self._find_unused or partial_use or self._muted or not (missing := self._reductions.without_gradient()):
            return
        else:
            why = f"{len(missing)} trained parameters (such as {missing[0]!r}) have no gradient on this rank"
        self._refuse(f"{why}. Set HeteroFSDPStrategy(find_unused_parameters=True), and the ranks agree each time")

    def _refuse(self, reason: str) -> NoReturn:
        self._fail(reason)
        raise UnsupportedFeatureError(f"`hetero_fsdp`: {reason}.")

    # ---- the end -----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Give the user's module its whole parameters back, on the host; every rank must call this together."""
        self.remove_hooks()
        for flat in [flat for unit in self.units for flat in unit.flats]:
            flat.restore()

    def remove_hooks(self) -> None:
        """Leave the module's ``forward`` alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def leave_group(self) -> None:
        """End the ranks' own group; no parameter can be gathered any more."""
        dist.destroy_process_group(self._group)
