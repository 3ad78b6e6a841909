"""Make all ranks gather and reduce units in one order, whatever each of them needs.

If one rank gathers unit 3 while another gathers unit 4, torch mixes up their parameters without an error. So the ranks
agree. The first time, they agree before each collective: all take part in the one that comes first among those that
ranks need, until each has what it needs. What they have done is the order of all later passes, which then need no
agreement, and in which the next collective can be started ahead. A rank that does not need a collective of that order
takes part all the same. One that needs a collective which does not come raises an error.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import torch
import torch.distributed as dist

from lightning_hetero.distributed.shards.passes.watch import PassWatch

__all__ = ["Collectives", "OrderOfUse"]


class Collectives(Protocol):
    """What is brought into order."""

    def start_gather(self, unit: int, *, needed: bool) -> None:
        """Start to gather a unit; if this rank does not need it, finish and release it at once."""
        ...

    def start_reduce(self, unit: int) -> None:
        """Start to reduce whatever gradients of a unit this rank has."""
        ...

    def may_gather_ahead(self) -> bool:
        """Return whether there is memory for one more unit."""
        ...


class OrderOfUse:
    """The order in which this rank takes part in collectives.

    Args:
        units: Number of units.
        collectives: What starts them.
        group: The ranks, whose hosts agree in it.
        watch: What notices that the ranks cannot go on.
    """

    def __init__(self, units: int, collectives: Collectives, group: dist.ProcessGroup, watch: PassWatch) -> None:
        self._units = units
        self._collectives = collectives
        self._group = group
        self._watch = watch
        self._known: dict[Hashable, list[int]] = {}
        self._key: Hashable = None
        self._backward = False
        self._fixed: list[int] | None = None
        self._done: list[int] = []
        self._position = 0
        self._ready: set[int] = set()

    # An entry is a number: gather unit u is u, reduce unit u is units + u, the end is 2 * units. The number after the
    # end marks a place where the ranks communicate otherwise.

    @property
    def _mark(self) -> int:
        return 2 * self._units + 1

    @property
    def is_fixed(self) -> bool:
        """Whether the order of the current pass is known."""
        return self._fixed is not None

    def begin(self, key: Hashable, *, backward: bool = False) -> None:
        """Begin a pass.

        Args:
            key: What this pass has in common with those of the same order; None if the ranks agree every time.
            backward: Whether units are used from the last to the first.
        """
        self._key, self._backward = key, backward
        self._fixed = None if key is None else self._known.get(key)
        self._done, self._position = [], 0
        self._ready.clear()

    def gather(self, unit: int) -> None:
        """Start to gather a unit that this rank needs now."""
        if self._fixed is None:
            self._agree_until(unit)
            return
        try:
            index = self._fixed.index(unit, self._position)
        except ValueError:
            self._watch.refuse(
                f"a unit is used that was not used in this place in the first step (unit {unit} of {self._units}): the"
                f" ranks gather units in the order of the first step. Use the units in the same order in every step,"
                f" or set HeteroFSDPStrategy(find_unused_parameters=True), with which the ranks agree each time"
            )
        while self._position < index:
            self._next(needed=False)
        self._next(needed=True)

    def reduce(self, unit: int) -> None:
        """Reduce the gradients of a unit, which are complete."""
        if self._fixed is None:
            self._agree_until(self._units + unit)
        else:
            self._ready.add(unit)
            self.go_ahead()

    def go_ahead(self) -> None:
        """Start whatever comes next and can be started without waiting."""
        if self._fixed is None:
            return
        while self._position < len(self._fixed):
            entry = self._fixed[self._position]
            if entry < self._units:
                if not self._collectives.may_gather_ahead():
                    return
                self._next(needed=True)
            elif entry - self._units in self._ready:
                self._next(needed=True)
            else:
                return

    def settle(self) -> None:
        """Take part in what other ranks need until all of them reach this point, where they communicate otherwise."""
        if self._fixed is None:
            self._agree_until(2 * self._units)
            self._done.append(self._mark)
        elif self._mark in self._fixed[self._position :]:
            while self._fixed[self._position] != self._mark:
                self._next(needed=False)
            self._position += 1

    def finish(self) -> None:
        """End a pass: take part in everything that other ranks still need."""
        if self._fixed is not None:
            while self._position < len(self._fixed):
                self._next(needed=False)
            return
        self._agree_until(2 * self._units)
        if self._key is not None and self._done:  # a pass that has not come yet may come in another step
            self._known[self._key] = _ahead(self._done, self._units)

    def _next(self, *, needed: bool) -> None:
        assert self._fixed is not None
        entry = self._fixed[self._position]
        self._position += 1
        self._start(entry, needed=needed)

    def _start(self, entry: int, *, needed: bool) -> None:
        if entry < self._units:
            self._collectives.start_gather(entry, needed=needed)
        elif entry != self._mark:
            self._ready.discard(entry - self._units)
            self._collectives.start_reduce(entry - self._units)

    def _agree_until(self, needed: int) -> None:
        while True:
            first = torch.tensor(self._priority(needed))
            self._watch.wait(dist.all_reduce(first, dist.ReduceOp.MIN, self._group, async_op=True))
            entry = self._entry(int(first))
            if entry == 2 * self._units:
                return
            self._done.append(entry)
            self._start(entry, needed=entry == needed)
            if entry == needed:
                return

    def _priority(self, entry: int) -> int:
        """Return a number that is the smaller the sooner an entry must come."""
        if not self._backward or entry == 2 * self._units:
            return entry
        # the last unit first, and reductions before anything else is gathered
        return 2 * self._units - 1 - entry

    def _entry(self, priority: int) -> int:
        return self._priority(priority)  # it is its own inverse


def _ahead(done: list[int], units: int) -> list[int]:
    """Return the order in which every unit is gathered right after the one gathered before it, if memory allows."""
    order: list[int] = []
    delayed: list[int] = []  # reductions that come after the gathering of the next unit
    for entry in done:
        if entry < units:
            order += [entry, *delayed]
            delayed = []
        elif entry > 2 * units:  # a mark stays where it is
            order += [*delayed, entry]
            delayed = []
        else:
            delayed.append(entry)
    return order + delayed
