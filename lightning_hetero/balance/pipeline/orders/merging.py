"""Compute backward passes whole where nothing is gained by computing their parts one by one.

Its two parts may take longer than the whole.  List scheduling splits all of them, and those whose parts need not be
apart are joined again.
"""

from __future__ import annotations

from itertools import pairwise

from lightning_hetero.balance.pipeline.orders.order import Action, Order
from lightning_hetero.balance.pipeline.simulation import PassTimes, order_step_s

__all__ = ["with_whole_passes"]

Place = tuple[int, int]  # stage and micro-batch


_EFFORT = 12_000  # passes that are simulated
_LEAST_GAIN = 0.002  # of the step, that splitting has to cost at most, so that single passes are worth the effort


def with_whole_passes(order: Order, times: PassTimes, transfer_s: float = 0.0) -> tuple[Order, float]:
    """Return an order with few split backward passes, and the seconds of its step.

    A step does not become longer by it, and no rank holds more: what a backward pass needs is released earlier.

    Args:
        order: The passes of each rank, in an order that ends.
        times: Time of each stage and micro-batch.
        transfer_s: Seconds until the result of a pass has reached another rank.
    """
    best, best_s = order, order_step_s(order, times, transfer_s)
    # first those whose parts follow each other at once
    groups = [_at_once(order)]
    if _what_parts_cost_s(order, times) > _LEAST_GAIN * best_s:
        at_once = {*groups[0]}
        groups.append([place for place in _places(order) if place not in at_once])
    left = _EFFORT
    while groups and left > 0:
        group = groups.pop(0)
        if not group:
            continue
        joined = _joined(best, {*group})
        left -= sum(map(len, joined.actions))
        step_s = order_step_s(joined, times, transfer_s)
        if step_s <= best_s:
            best, best_s = joined, step_s
        elif len(group) > 1:
            half = len(group) // 2
            groups += [group[:half], group[half:]]  # large groups first
    return best, best_s


def _what_parts_cost_s(order: Order, times: PassTimes) -> float:
    """Return by how much a rank could be faster, at most."""
    whole_s = [times.whole_s(stage) for stage in range(order.num_stages)]
    found = [0.0] * len(order.actions)
    for stage, i in _places(order):
        found[order.ranks[stage]] += times.input_s[stage][i] + times.weight_s[stage][i] - whole_s[stage][i]
    return max(found)


def _places(order: Order) -> list[Place]:
    """Return the backward passes that are split."""
    return [(a.stage, a.micro_batch) for actions in order.actions for a in actions if a.kind == "input"]


def _at_once(order: Order) -> list[Place]:
    """Return the backward passes whose second part follows the first one at once."""
    return [
        (a.stage, a.micro_batch)
        for actions in order.actions
        for a, b in pairwise(actions)
        if (a.kind, b.kind) == ("input", "weight") and a[1:] == b[1:]
    ]


def _joined(order: Order, places: set[Place]) -> Order:
    """Return an order in which some backward passes are whole."""
    actions = []
    for own in order.actions:
        kept = [a for a in own if a.kind != "weight" or (a.stage, a.micro_batch) not in places]
        whole = (a.kind == "input" and (a.stage, a.micro_batch) in places for a in kept)
        actions.append(
            tuple(Action("backward", *a[1:]) if is_whole else a for a, is_whole in zip(kept, whole, strict=True))
        )
    return Order(order.ranks, order.micro_batches, tuple(actions))
