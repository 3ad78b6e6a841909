"""Complete what ranks have measured of layers: the loss that not every rank computes, and what a pass always takes."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.pipeline.stages import LayerCosts

__all__ = ["by_size", "with_loss_everywhere"]

_Rows = tuple[tuple[float, ...], ...]


def with_loss_everywhere(costs: LayerCosts, is_timed: Sequence[bool]) -> LayerCosts:
    """Return costs in which the last layer contains the loss, also on ranks that have not timed it.

    Relative to the other layers, the last one then takes as long there as where the loss was timed.

    Args:
        costs: Costs of the ranks.
        is_timed: Whether each rank has timed the loss, with its last layer; at least one has.
    """
    like = is_timed.index(True)

    def completed(rows: _Rows) -> _Rows:
        others = sum(rows[like][:-1])
        if not others:
            return rows
        last = [rows[like][-1] * sum(row[:-1]) / others for row in rows]
        return tuple(
            row if timed else (*row[:-1], max(row[-1], least_s))
            for row, timed, least_s in zip(rows, is_timed, last, strict=True)
        )

    return LayerCosts(completed(costs.forward_s), completed(costs.backward_s))


def by_size(large: LayerCosts, small: LayerCosts, ratio: float) -> tuple[LayerCosts, LayerCosts]:
    """Return the part of the times that grows with the number of samples, and the part that does not.

    Neither is negative, whatever was measured.

    Args:
        large: Times of a micro-batch.
        small: Times of a smaller one.
        ratio: How many times as large the former is, above 1.

    Returns:
        What grows, for the larger micro-batch, and what does not.
    """

    def fixed(a: float, b: float) -> float:
        return min(max(a - (a - b) * ratio / (ratio - 1), 0.0), a, b)

    def fixed_rows(a: _Rows, b: _Rows) -> _Rows:
        return tuple(tuple(map(fixed, x, y)) for x, y in zip(a, b, strict=True))

    def without(a: _Rows, overhead: _Rows) -> _Rows:
        return tuple(tuple(p - q for p, q in zip(x, y, strict=True)) for x, y in zip(a, overhead, strict=True))

    forward, backward = fixed_rows(large.forward_s, small.forward_s), fixed_rows(large.backward_s, small.backward_s)
    growing = LayerCosts(without(large.forward_s, forward), without(large.backward_s, backward))
    return growing, LayerCosts(forward, backward)
