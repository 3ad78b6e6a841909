"""Predict a step with shards: units are gathered and reduced over one link while other units are computed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Event", "ShardedStep"]

_FORWARD_PART = 1 / 3  # the backward pass costs twice as much as the forward pass


@dataclass(frozen=True)
class Event:
    """Something that a rank or its link does in a step.

    Attributes:
        kind: "gather" and "reduce" for the link, "forward" and "backward" for the device.
        unit: Number of the unit, from 1 on.
        begin_s: When it begins, in seconds since the step has begun.
        end_s: When it ends.
    """

    kind: str
    unit: int
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class ShardedStep:
    """A step of the slowest rank.

    Attributes:
        own_s: Seconds that the rank needs by itself.
        gather_s: Seconds that gathering one unit takes.
        reduce_s: Seconds that reducing the gradients of one unit takes.
        units: Number of units, which are equal.

    Example:
        >>> ShardedStep(own_s=0.3, gather_s=0.0, reduce_s=0.0, units=3).step_s
        0.3
        >>> round(ShardedStep(own_s=0.3, gather_s=0.01, reduce_s=0.01, units=3).step_s, 3)  # both first, and the last
        0.33
    """

    own_s: float
    gather_s: float
    reduce_s: float
    units: int

    @property
    def link_s(self) -> float:
        """The seconds for which the link is busy."""
        return self.units * (2 * self.gather_s + self.reduce_s)

    @property
    def step_s(self) -> float:
        """The seconds of the whole step."""
        return max(event.end_s for event in self.events())

    def events(self) -> list[Event]:
        """Return what the device and the link do.

        The link carries one thing at a time, in the order of the engine: in the backward pass it gathers the next unit
        before it reduces the one that has been used. A unit is gathered when the one before the previous one has been
        used, so that at most two are whole.
        """
        forward, backward = (self.own_s * part / self.units for part in (_FORWARD_PART, 1 - _FORWARD_PART))
        order = [*range(1, self.units + 1), *range(self.units, 0, -1)]
        found: list[Event] = []
        link = 0.0
        ends = [0.0, 0.0]  # of the uses of units, in their order

        def carry(kind: str, unit: int, from_s: float, seconds: float) -> None:
            nonlocal link
            begin = max(link, from_s)
            link = begin + seconds
            found.append(Event(kind, unit, begin, link))

        for number, unit in enumerate(order):
            # the last unit is released after its forward pass, and gathered again for its backward pass
            carry("gather", unit, ends[-1] if number == self.units else ends[-2], self.gather_s)
            begin = max(link, ends[-1])
            if number > self.units:  # while this unit is used, the gradients of the one before are reduced
                carry("reduce", order[number - 1], ends[-1], self.reduce_s)
            is_forward = number < self.units
            ends.append(begin + (forward if is_forward else backward))
            found.append(Event("forward" if is_forward else "backward", unit, begin, ends[-1]))
        carry("reduce", order[-1], ends[-1], self.reduce_s)
        return found
