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

from lightning_hetero.balance.shards.cuts import Cutter
from lightning_hetero.distributed.shards.buffers import Buffers
from lightning_hetero.distributed.shards.exchange import exchange_for
from lightning_hetero.distributed.shards.hooks import SavedCasts, UnitHooks, tensors_in
from lightning_hetero.distributed.shards.passes.groups import Groups
from lightning_hetero.distributed.shards.passes.meeting import Meeting
from lightning_hetero.distributed.shards.passes.order import OrderOfUse
from lightning_hetero.distributed.shards.passes.places import Place
from lightning_hetero.distributed.shards.passes.watch import PassWatch
from lightning_hetero.distributed.shards.reductions import Reductions
from lightning_hetero.distributed.shards.released import without_gradients
from lightning_hetero.distributed.shards.unit import Unit, WholeUnits
from lightning_hetero.distributed.shards.units import plan_units
from lightning_hetero.distributed.torch_private import current_backward_pass, node_of_base
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["ShardEngine"]

_OWN_BACKWARD = (
    "it must know when a backward pass ends, so gradients must be computed by Lightning. Use"
    " `self.manual_backward(loss)` in `training_step` instead of `loss.backward()`"
)


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
        frees_casts: Whether what autocast makes of parameters is freed while they are released.
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
        self._groups, rank = Groups.make(device), dist.get_rank()
        self._waiting, self._fail = waiting, fail
        self._find_unused, self._reshard = find_unused_parameters, reshard_after_forward
        self._is_on_host = device.type == "cpu"
        self._watch = PassWatch(self._groups.hosts, fail)
        self._exchange, cutter = exchange_for(device, self._groups, self._watch), Cutter(weights)
        planned = plan_units(root, units)
        self.units = [
            Unit(number, plan, cutter, rank, device, self._exchange)
            for number, plan in enumerate(planned)
            if number == 0 or plan.parameters
        ]
        for number, unit in enumerate(self.units):
            unit.number = number
        self._buffers = Buffers(root, device, self._groups.forward, waiting, self._exchange.wait)
        self._whole = WholeUnits(self.units, reshard_after_forward, waiting)
        self._order = OrderOfUse(len(self.units), self, self._groups.hosts, self._watch)
        self._meeting = Meeting(self._groups.hosts, waiting, self._watch)
        self._reductions = Reductions(self.units, self._groups.hosts, waiting, self._watch)
        self._kind: str | None = None
        self._steps = self._passes = self._hooks_run = self._depth = 0
        self._backward_follows = self._in_backward = self._muted = False
        self._casts, self._hooks = SavedCasts(self.units), UnitHooks(self.units, self)
        self.reduces, self.frees_casts = True, False

    @property
    def most_whole_units(self) -> int:
        """The largest number of units, besides the root, that were whole at a time."""
        return self._whole.most_units

    @property
    def most_whole_bytes(self) -> int:
        """The largest memory that whole parameters have taken."""
        return self._whole.most_bytes

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

    # ---- gather and release ------------------------------------------------------------------------------------------

    def before_forward(self, unit: Unit) -> None:
        """Gather a unit whose parameters are about to be used; see :class:`UsesUnits`."""
        if not unit.active and unit.is_stale and current_backward_pass() == -1:
            unit.renew()  # an optimiser has stepped, or the user has written
        self._need(unit)
        self._order.go_ahead()
        unit.active += 1
        unit.used = True
        self._depth += 1
        if unit is self.root:
            for flat in unit.flats:
                flat.follow_freezing()

    def after_forward(self, unit: Unit, output: Any) -> None:
        """Release a unit whose parameters have been used; see :class:`UsesUnits`."""
        unit.active = max(unit.active - 1, 0)
        self._depth = max(self._depth - 1, 0)
        found = list(tensors_in(output))
        if torch.is_grad_enabled() and self._kind is not None:
            for tensor in found:
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(partial(self._before_backward, unit))
                    if (node := node_of_base(tensor)) is not None:
                        node.register_prehook(partial(self._before_backward, unit))
        if current_backward_pass() == -1 and not unit.active and unit.is_whole and unit is not self.root:
            self._after_use(unit, found)
        if not self._depth and self._kind == "hook":
            if not self._meeting.failed:  # the ranks are elsewhere, and this rank raises
                self._finish()
            self._end()

    def _after_use(self, unit: Unit, found: Sequence[Tensor]) -> None:
        # a checkpointed forward pass is repeated in the backward pass, which follows
        trains = torch.is_grad_enabled() and self._kind == "train"
        if not self._reshard and torch.is_grad_enabled():
            return
        if unit.shares_memory_with(found) or (trains and not found and unit.trains):
            unit.lent = True  # its parameters are used elsewhere, or nothing will tell of its backward pass
        elif not unit.lent:
            self._whole.release(unit)
        self._order.go_ahead()

    def _before_backward(self, unit: Unit, _: Any) -> None:
        """Gather a unit when the gradient of an output of one of its modules has been computed."""
        if self._reshard and not self._in_backward and torch.is_grad_enabled():
            self._refuse(
                "gradients of gradients (`create_graph=True`) need all parameters at the same time. Set"
                " HeteroFSDPStrategy(reshard_after_forward=False), which keeps them until the backward pass has ended"
            )
        if self._kind is None:
            self._refuse(_OWN_BACKWARD)
        self._need(unit)
        unit.make_casts()
        self._order.go_ahead()

    def _need(self, unit: Unit) -> None:
        if unit.is_whole:
            return
        if self._kind is None:
            self._kind, self._hooks_run = "hook", self._hooks_run + 1
            self._begin("hook")
        if not self._order.is_fixed:
            self._meeting.check()
        if not unit.in_flight:
            if unit is not self.root:
                self._whole.make_room(unit)
            self._order.gather(unit.number)
        if self._is_on_host:  # hosts of devices run ahead, and must not wait for each other
            self._meeting.check()
        with self._waiting():
            unit.finish_gathering()
        if unit is not self.root:
            self._whole.make_room(unit)

    def start_gather(self, unit: int, *, needed: bool) -> None:
        """Start to gather a unit; see :class:`~lightning_hetero.distributed.shards.passes.order.Collectives`."""
        self._whole.start_gather(unit, needed=needed)

    def may_gather_ahead(self) -> bool:
        """Return whether there is memory for one more unit."""
        return self._whole.may_gather_ahead()

    def synchronise_buffers(self) -> None:
        """Give all ranks the buffers of rank 0, as DDP does before a forward pass."""
        if self._buffers:
            self._meeting.check()
            self._buffers.synchronise()

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Register the parts of all parameters in this context; every rank must call this at the same point."""
        self.settle()
        self._meeting.begin(Place.of("saving", self._steps, self._passes))
        self._meeting.check()
        with self._whole.in_parts():
            yield

    # ---- passes ------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, kind: str, *, backward_follows: bool = False, buffers_follow: bool = True) -> Iterator[None]:
        """Let the model be used in this context, and if a backward pass follows, until that has ended.

        Args:
            kind: What the step does. In "train" the order of units is fixed; in all others the ranks may use different
                units, and in "predict" the ranks may have different numbers of steps.
            backward_follows: Whether the step has one backward pass, which begins after the context has been left.
            buffers_follow: Whether all ranks take the buffers of rank 0, in a training step.
        """
        self.close()
        self._kind, self._passes, self._backward_follows = kind, 0, backward_follows
        self._steps += kind != "predict"
        self._begin("forward")
        if kind == "train" and buffers_follow:
            self.synchronise_buffers()
        self._need(self.root)
        with self._casts.noticed() if kind == "train" and self.frees_casts else nullcontext():
            yield
        if not backward_follows:
            if kind != "predict":
                self._finish()
            if kind == "train":  # a rank that has left out a backward pass may wait elsewhere from now on
                self._meeting.begin(Place.of("end", self._steps, self._passes))
            self._end()

    def close(self) -> None:
        """End the last step, if it has not ended; every rank must call this at the same point."""
        if self._kind is not None and self._kind != "predict":
            self._finish()
        self._end()

    def _end(self) -> None:
        self._kind, self._depth = None, 0
        self._whole.release_all(forget_casts=True)

    def refresh(self) -> None:
        """Release units whose parts have been changed since they were gathered, as a step of an optimiser does."""
        if not self._in_backward:
            for unit in self.units:
                if unit.is_whole and unit.is_stale and not unit.active:
                    unit.release()

    def settle(self) -> None:
        """Prepare for the ranks to communicate in a step; every rank must call this at the same point."""
        if self._kind is not None and not self._in_backward:
            self._meeting.check()
            with self._waiting():
                self._order.settle()

    def drain(self) -> None:
        """Take part in what other ranks need until all of them have ended their steps."""
        self._begin("end")
        self._order.finish()

    def _begin(self, name: str) -> None:
        trained = hash(tuple(shard.requires_grad for shard in self.shards))
        fixed = self._kind == "train" and not self._find_unused
        key = (self._passes, name, self.reduces, trained) if fixed else None
        self._order.begin(key, backward=name == "backward")
        if self._kind == "hook":
            self._meeting.begin(Place.of("hook", self._steps, self._hooks_run))
        elif self._kind is not None and self._kind != "predict":
            kind = "backward" if name == "backward" else self._kind
            is_ordinary = self._order.is_fixed and self._backward_follows
            self._meeting.begin(Place.of(kind, self._steps, self._passes, trained), tell=not is_ordinary)

    def _finish(self) -> None:
        self._meeting.check()
        with self._waiting():
            self._order.finish()

    @contextmanager
    def backward(self, *, partial_use: bool = False, muted: bool = False) -> Iterator[None]:
        """Run a backward pass in this context; afterwards the parts have their gradients.

        Args:
            partial_use: Whether the pass may leave parameters out on purpose.
            muted: Whether this rank has no sample, so that its gradients count as zero whatever they are, and the
                parameters as not used by it.
        """
        if self._kind != "train":
            self._refuse("a backward pass runs outside of `training_step`. Call `self.manual_backward` inside of it")
        self._finish()
        self._begin("backward")
        self._in_backward = self._exchange.in_backward = True
        for unit in self.units:
            unit.arrived = 0
            unit.expected = unit.usual or sum(shard.requires_grad for shard in unit.shards)
            for flat in unit.flats:
                flat.begin_backward()
        self._order.go_ahead()
        self._muted = muted
        try:
            with without_gradients(self.leaves if muted else []):
                yield
                self._end_backward(partial_use)
        finally:
            self._in_backward = self._muted = self._exchange.in_backward = False

    def _end_backward(self, partial_use: bool) -> None:
        if self.reduces:
            for unit in reversed(self.units):
                if unit.has_gradients:
                    if self._find_unused:  # some of its parameters are not used: next time it need not wait for them
                        unit.usual = unit.arrived
                    self._order.reduce(unit.number)
        self._finish()
        self._reductions.finish()
        if self.reduces:
            if self._find_unused or partial_use:
                self._reductions.agree_on_used(muted=self._muted)
            self._check_complete(partial_use)
        self._whole.release_all()
        self._passes += 1
        if self._backward_follows:
            self._end()
        else:
            self._begin("forward")

    def gradient_arrived(self, unit: Unit) -> None:
        """Reduce a unit whose gradients are complete; see :class:`UsesUnits`."""
        if not self._in_backward:
            self._refuse(_OWN_BACKWARD)
        if not unit.is_whole:
            self._refuse(
                f"a gradient of {type(unit.module).__name__} has been computed without its parameters, because nothing"
                f" told of its backward pass: its `forward` returns no tensor, or an object whose tensors cannot be"
                f" found. Return tensors, or set HeteroFSDPStrategy(reshard_after_forward=False)"
            )
        unit.arrived += 1
        if unit.arrived == unit.expected:
            unit.arrived = 0
            if self.reduces and unit is not self.root:
                self._order.reduce(unit.number)

    def start_reduce(self, unit: int) -> None:
        """Start to reduce a unit; see :class:`~lightning_hetero.distributed.shards.passes.order.Collectives`."""
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
        self._hooks.remove()
        for flat in [flat for unit in self.units for flat in unit.flats]:
            flat.restore()

    def remove_hooks(self) -> None:
        """Leave the module's ``forward`` alone from now on."""
        self._hooks.remove()
        self._watch.stop()

    def leave_group(self) -> None:
        """End the ranks' own group; no parameter can be gathered any more."""
        self._watch.stop()
        self._groups.close()
