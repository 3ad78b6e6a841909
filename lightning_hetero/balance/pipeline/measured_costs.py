"""Complete what ranks have measured of layers: the loss that not every rank computes, and what a pass always takes."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.pipeline.stages import LayerCosts

__all__ = ["by_size", "split_where_possible", "with_loss_everywhere"]

_Rows = tuple[tuple[float, ...], ...]


def with_loss_everywhere(costs: LayerCosts, is_timed: Sequence[bool]) -> LayerCosts:
    """Return costs in which the last layer contains the loss, also on ranks that have not timed it.

    Relative to the other layers, the last one then takes as long there as where the loss was timed. The loss is part of
    what other ranks wait for, if backward passes are split.

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

    backward = completed(costs.backward_s)
    inputs = tuple(
        (*row[:-1], row[-1] + after[-1] - before[-1])
        for row, before, after in zip(costs.input_s, costs.backward_s, backward, strict=bool(costs.input_s))
    )
    return LayerCosts(completed(costs.forward_s), backward, inputs, costs.weight_s)


def split_where_possible(costs: Sequence[LayerCosts]) -> tuple[list[LayerCosts], tuple[int, ...]]:
    """Return costs in which backward passes are split only of layers of which all ranks can split them.

    Args:
        costs: Costs of the ranks for each size of micro-batches.

    Returns:
        The costs, and the numbers of the layers that can be split.
    """
    rows = [row for one in costs for row in one.weight_s]
    split = tuple(i for i in range(costs[0].num_layers) if rows and min(row[i] for row in rows) > 0)
    if not split:
        return [LayerCosts(one.forward_s, one.backward_s) for one in costs], ()

    def chosen(parts: _Rows, otherwise: _Rows) -> _Rows:
        return tuple(
            tuple(a if i in split else b for i, (a, b) in enumerate(zip(x, y, strict=True)))
            for x, y in zip(parts, otherwise, strict=True)
        )

    found = []
    for one in costs:
        none = tuple((0.0,) * one.num_layers for _ in one.weight_s)
        parts = chosen(one.input_s, one.backward_s), chosen(one.weight_s, none)
        found.append(LayerCosts(one.forward_s, one.backward_s, *parts))
    return found, split


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

    kinds = list(zip(_kinds(large), _kinds(small), strict=True))
    overheads = [fixed_rows(a, b) for a, b in kinds]
    growing = [without(a, overhead) for (a, _), overhead in zip(kinds, overheads, strict=True)]
    return LayerCosts(*growing), LayerCosts(*overheads)


def _kinds(costs: LayerCosts) -> tuple[_Rows, ...]:
    return costs.forward_s, costs.backward_s, costs.input_s, costs.weight_s
