"""A unit of a model, whose parameters are whole together, and which of all units are whole at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from torch import Tensor, nn

from lightning_hetero.balance.shards.cuts import Cutter
from lightning_hetero.distributed.shards.exchange import Exchange
from lightning_hetero.distributed.shards.flat import FlatParameters
from lightning_hetero.distributed.shards.units import PlannedParameter, PlannedUnit, materialise

__all__ = ["Unit", "WholeUnits"]

_MOST_WHOLE = 2


class Unit:
    """The parameters of a unit, and how far the current pass has come with them.

    Args:
        number: Number of the unit; 0 is the root.
        planned: The parameters, and the module whose ``forward`` uses them.
        cutter: What decides which rank keeps what.
        rank: This rank.
        device: Device of this rank.
        exchange: Collectives.

    Attributes:
        in_flight: Whether the parameters are being gathered.
        promised: How many times the unit has been gathered ahead while it was whole.
        active: How many calls of ``forward`` are under way, of the module or of those in it that own parameters.
        lent: Whether the unit must stay whole until the step ends, because its parameters are used outside of it.
        used: Whether a ``forward`` has run since the unit was gathered, which may have written the parameters; those of
            the root may be written anywhere in a step.
        arrived: How many gradients have been computed since the last reduction.
        expected: How many are computed until the next one.
        usual: How many that was, if it is not all; 0 if it is.
    """

    def __init__(
        self,
        number: int,
        planned: PlannedUnit,
        cutter: Cutter,
        rank: int,
        device: torch.device,
        exchange: Exchange,
    ) -> None:
        self.number = number
        self.module = planned.module
        self.owners = planned.owners
        materialise(planned, device)
        self.flats: list[FlatParameters] = []
        for parameters in _by_type(planned.parameters):
            leaves = [parameter.places[0].get() for parameter in parameters]
            cuts = cutter.cut(sum(leaf.numel() for leaf in leaves), leaves[0].element_size())
            self.flats.append(FlatParameters(parameters, cuts, rank, device, exchange))
        self.is_whole = False
        self.in_flight = False
        self.promised = 0
        self.active = 0
        self.lent = False
        self.used = False
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self.arrived = 0
        self.expected = 0
        self.usual = 0

    @property
    def shards(self) -> list[nn.Parameter]:
        """The parts of the parameters."""
        return [shard for flat in self.flats for shard in flat.shards]

    @property
    def leaves(self) -> list[nn.Parameter]:
        """The user's parameters, which are whole while the unit is."""
        return [leaf for flat in self.flats for leaf in flat.leaves]

    @property
    def whole_bytes(self) -> int:
        """The memory that the gathered parameters take now."""
        return sum(flat.whole_bytes for flat in self.flats)

    @property
    def trains(self) -> bool:
        """Whether any of the parameters is trained now."""
        return any(flat.trains for flat in self.flats)

    @property
    def has_gradients(self) -> bool:
        """Whether gradients are waiting to be reduced."""
        return any(gradient is not None for flat in self.flats for gradient in flat.gradients)

    @property
    def is_stale(self) -> bool:
        """Whether the parts have been changed since the whole parameters were gathered."""
        return any(flat.is_stale for flat in self.flats)

    def shares_memory_with(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether any of the tensors lies in the memory of the whole parameters."""
        own = {flat.address for flat in self.flats} - {0}
        for tensor in tensors:
            with suppress(RuntimeError, NotImplementedError):  # a tensor without memory
                if tensor.untyped_storage().data_ptr() in own:
                    return True
        return False

    def start_gathering(self) -> None:
        """Start to gather the parameters."""
        for flat in self.flats:
            flat.start_gathering()
        self.in_flight = True

    def gather_again(self) -> None:
        """Gather what this rank has already, because other ranks need it."""
        for flat in self.flats:
            flat.gather_again()

    def renew(self) -> None:
        """Gather the parts again, which have been changed; all ranks do so, because all run the same program."""
        if self.in_flight:
            for flat in self.flats:
                flat.wait()
                flat.start_gathering()
        elif self.is_whole:
            self.release()

    def finish_gathering(self) -> None:
        """Wait for the parameters, and register them."""
        for flat in self.flats:
            flat.finish_gathering()
        self.in_flight, self.is_whole = False, True

    def keep_cast(self, cast: Tensor, leaf: Tensor) -> None:
        """Free a tensor of another type, which autograd has saved, while the unit is released.

        Args:
            cast: The tensor.
            leaf: The parameter that it was made from.
        """
        storage = cast.untyped_storage()
        if storage.data_ptr() not in self._casts:
            # the same memory, but changes of it do not count as the user's
            alias = cast.new_empty(0).set_(storage, cast.storage_offset(), cast.shape, cast.stride())
            self._casts[storage.data_ptr()] = (alias, leaf)

    def make_casts(self) -> None:
        """Compute again what :meth:`keep_cast` was told of."""
        with torch.no_grad():
            for alias, leaf in self._casts.values():
                if not alias.untyped_storage().nbytes():
                    alias.untyped_storage().resize_(alias.numel() * alias.element_size())
                    alias.copy_(leaf)

    def forget_casts(self) -> None:
        """Leave tensors of other types alone from now on."""
        self._casts.clear()

    def show(self, *, whole: bool) -> None:
        """Register the whole parameters or the parts of a unit that stays whole."""
        for flat in self.flats:
            flat.show(whole=whole)

    def release(self) -> None:
        """Register the parts, and free the memory of the whole parameters."""
        for flat in self.flats:
            flat.release(keep=self.used or self.number == 0)
        self.used = False
        for alias, _ in self._casts.values():
            alias.untyped_storage().resize_(0)
        self.in_flight = self.is_whole = False


def _by_type(parameters: Sequence[PlannedParameter]) -> list[list[PlannedParameter]]:
    """Group parameters that can lie in one row, and that are trained or frozen together."""
    groups: dict[tuple[torch.dtype, bool], list[PlannedParameter]] = {}
    for parameter in parameters:
        leaf = parameter.places[0].get()
        groups.setdefault((leaf.dtype, leaf.requires_grad), []).append(parameter)
    return list(groups.values())


class WholeUnits:
    """Which units of this rank are whole or being gathered.

    Args:
        units: The units; the first one is the root, which is not counted.
        reshard: Whether units are released between their uses in a step.
        waiting: Returns a context in which this rank may wait for others.

    Attributes:
        most_units: The largest number of units, besides the root, that were whole at a time.
        most_bytes: The largest memory that whole parameters have taken.
    """

    def __init__(
        self, units: Sequence[Unit], reshard: bool, waiting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._units = units
        self._reshard = reshard
        self._waiting = waiting
        self.most_units = 0
        self.most_bytes = 0

    def start_gather(self, unit: int, *, needed: bool) -> None:
        """Start to gather a unit; if this rank does not need it, finish and release it at once."""
        target = self._units[unit]
        if target.is_whole or target.in_flight:
            with self._waiting():
                target.gather_again()
            target.promised += needed
            return
        target.start_gathering()
        self._note_memory()
        if not needed:
            with self._waiting():
                target.release()

    def may_gather_ahead(self) -> bool:
        """Return whether fewer than two units are whole or under way, besides those that stay whole."""
        return not self._reshard or sum(self._counts(unit) for unit in self._units[1:]) < _MOST_WHOLE

    def _counts(self, unit: Unit) -> bool:
        return (unit.is_whole or unit.in_flight) and not unit.lent

    def make_room(self, used: Unit) -> None:
        """Release units that are neither in use nor gathered ahead."""
        if self._reshard:
            for unit in self._units[1:]:
                if unit.is_whole and unit is not used and not unit.active and not unit.lent:
                    self.release(unit)

    def release(self, unit: Unit) -> None:
        """Release a unit, unless it has been gathered ahead for its next use."""
        if unit.promised:
            unit.promised -= 1  # other ranks gather it again where this one keeps it
        else:
            unit.release()

    def release_all(self, *, forget_casts: bool = False) -> None:
        """Release every unit.

        Args:
            forget_casts: Whether no backward pass of this step follows, which would need what autocast has made.
        """
        for unit in self._units:
            unit.promised = unit.active = 0
            unit.lent = False
            if unit.is_whole or unit.in_flight:
                unit.release()
            if forget_casts:
                unit.forget_casts()

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Register the parts of all units in this context, also of those that are whole."""
        whole = [unit for unit in self._units if unit.is_whole]
        for unit in whole:
            unit.show(whole=False)
        try:
            yield
        finally:
            for unit in whole:
                unit.show(whole=True)

    def _note_memory(self) -> None:
        live = [unit for unit in self._units if unit.is_whole or unit.in_flight]
        self.most_units = max(self.most_units, sum(unit is not self._units[0] for unit in live))
        self.most_bytes = max(self.most_bytes, sum(unit.whole_bytes for unit in live))
