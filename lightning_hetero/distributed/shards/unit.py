"""A unit of a model: parameters that are whole together, in one row of memory per type of number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lightning_hetero.balance.shards.cuts import Cutter
from lightning_hetero.distributed.shards.exchange import Exchange
from lightning_hetero.distributed.shards.flat import FlatParameters
from lightning_hetero.distributed.shards.units import PlannedParameter, PlannedUnit, materialise

__all__ = ["Unit"]


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
        active: How many calls of the module's ``forward`` are under way.
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
    def names(self) -> list[str]:
        """The names of the parameters in the model, in the order of ``shards`` and ``leaves``."""
        return [parameter.name for flat in self.flats for parameter in flat.parameters]

    @property
    def whole_bytes(self) -> int:
        """The memory that the gathered parameters take now."""
        return sum(flat.whole_bytes for flat in self.flats)

    @property
    def has_gradients(self) -> bool:
        """Whether gradients are waiting to be reduced."""
        return any(leaf.grad is not None for leaf in self.leaves)

    def start_gathering(self) -> None:
        """Start to gather the parameters."""
        for flat in self.flats:
            flat.start_gathering()
        self.in_flight = True

    def finish_gathering(self) -> None:
        """Wait for the parameters, and register them."""
        for flat in self.flats:
            flat.finish_gathering()
        self.in_flight, self.is_whole = False, True

    def release(self) -> None:
        """Register the parts, and free the memory of the whole parameters."""
        for flat in self.flats:
            flat.release()
        self.in_flight = self.is_whole = False


def _by_type(parameters: Sequence[PlannedParameter]) -> list[list[PlannedParameter]]:
    """Group parameters that can lie in one row, and that are trained or frozen together."""
    groups: dict[tuple[torch.dtype, bool], list[PlannedParameter]] = {}
    for parameter in parameters:
        leaf = parameter.places[0].get()
        groups.setdefault((leaf.dtype, leaf.requires_grad), []).append(parameter)
    return list(groups.values())
