"""Predict a step with shards: units are gathered and reduced over one link while other units are computed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ShardedStep"]

_FORWARD_PART = 1 / 3  # the backward pass costs twice as much as the forward pass


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
        >>> round(ShardedStep(own_s=0.3, gather_s=0.01, reduce_s=0.01, units=3).step_s, 3)  # the first and the last
        0.32
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
        """The seconds of the whole step.

        The link carries one thing at a time, in the order of the engine: in the backward pass it gathers the next unit
        before it reduces the one that has been used. A unit is gathered when the one before the previous one has been
        used, so that at most two are whole.
        """
        forward, backward = (self.own_s * part / self.units for part in (_FORWARD_PART, 1 - _FORWARD_PART))
        link = 0.0
        ends = [0.0, 0.0]  # of the uses of units, in their order
        for number in range(2 * self.units):
            link = max(link, ends[-2]) + self.gather_s
            begin = max(link, ends[-1])
            if number > self.units:  # while this unit is used, the gradients of the one before are reduced
                link = max(link, ends[-1]) + self.reduce_s
            ends.append(begin + (forward if number < self.units else backward))
        return max(link, ends[-1]) + self.reduce_s
