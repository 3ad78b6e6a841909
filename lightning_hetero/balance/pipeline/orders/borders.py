"""Place the borders between stages, also within a layer that two stages share.

A border lies after a number of layers, in parts of a layer as small as a micro-batch: if it lies within a layer, the
stage before runs this layer for as many of the micro-batches.  For which ones matters to how the ranks wait for others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan

__all__ = ["WHICH", "Which", "ends_within", "neighbours", "plan_at"]

Which = Literal["first", "last", "even"]
WHICH: tuple[Which, ...] = get_args(Which)


def plan_at(ranks: tuple[int, ...], ends: Sequence[int], which: Which, micro_batches: int) -> StagePlan | None:
    """Return the stages that end at some places; None if one would have no layer for a micro-batch.

    Args:
        ranks: Rank of each stage.
        ends: Where each stage ends, counted in layers times ``micro_batches``.
        which: Which micro-batches a stage runs the layer for in which it ends.
        micro_batches: Number of micro-batches per step.
    """
    parts = [divmod(end, micro_batches) for end in ends]
    lent = tuple(_micro_batches(which, count, micro_batches) for _, count in parts[:-1])
    return _valid(ranks, tuple(layer for layer, _ in parts), lent)


def neighbours(plan: StagePlan, micro_batches: int, shared: Collection[int]) -> Iterator[StagePlan]:
    """Yield plans in which one border lies one layer further, or one micro-batch, or runs other micro-batches.

    Args:
        plan: The stages.
        micro_batches: Number of micro-batches per step.
        shared: Indices of the layers that two stages may share.
    """
    m = micro_batches
    for stage in range(plan.num_stages - 1):
        end, lent = plan.ends[stage], plan.lent[stage] if plan.lent else ()
        steps = [(end - 1, lent), (end + 1, lent)]
        if shared:
            place, which = end * m + len(lent), _which(lent, m)
            moved = [(*divmod(place + step, m), which) for step in (-1, 1)]
            steps += [(layer, _micro_batches(kind, count, m)) for layer, count, kind in moved]
            steps += [(end, _micro_batches(kind, len(lent), m)) for kind in WHICH if lent and kind != which]
        for layer, micro in steps:
            if micro and layer not in shared:
                continue
            rows = plan.lent or ((),) * (plan.num_stages - 1)
            ends = (*plan.ends[:stage], layer, *plan.ends[stage + 1 :])
            found = _valid(plan.ranks, ends, (*rows[:stage], micro, *rows[stage + 1 :]))
            if found is not None:
                yield found


def ends_within(
    costs: LayerCosts,
    ranks: tuple[int, ...],
    part: float,
    step_s: float,
    transfer_s: float,
    micro_batches: int,
    shared: Collection[int],
) -> tuple[int, ...] | None:
    """Return where stages end that have as much work as they can do in a step; None if layers remain.

    A rank has the time of a step for its work, less that of the passes before its first one.

    Args:
        costs: Time of every layer on every rank, for one micro-batch.
        ranks: Rank of each stage.
        part: Part of its work that a rank with several stages has in one that is not its last.
        step_s: Seconds per step.
        transfer_s: Seconds that a transfer between two ranks takes.
        micro_batches: Number of micro-batches per step.
        shared: Indices of the layers that two stages may share.

    Returns:
        For each stage, where it ends, counted in layers times ``micro_batches``.
    """
    m, layers = micro_batches, costs.num_layers
    prefixes, forward = costs.until_s, costs.forward_until_s
    left_s: dict[int, float] = {}
    head_s, end = 0.0, 0
    ends: list[int] = []
    for stage, rank in enumerate(ranks):
        prefix = prefixes[rank]
        left_s.setdefault(rank, (step_s - head_s) / m)
        room_s = left_s[rank] * (part if rank in ranks[stage + 1 :] else 1.0)
        most_s = (_at(prefix, end, m) + room_s) * (1 + 1e-12)
        layer = min(bisect_right(prefix, most_s) - 1, layers)
        start, end = end, layer * m
        if layer in shared:
            end += min(int((most_s - prefix[layer]) / (prefix[layer + 1] - prefix[layer]) * m), m - 1)
        end = min(end, (layers - (len(ranks) - 1 - stage)) * m)
        if end < start + m:
            return None
        left_s[rank] -= _at(prefix, end, m) - _at(prefix, start, m)
        head_s += _at(forward[rank], end, m) - _at(forward[rank], start, m) + transfer_s
        ends.append(end)
    return tuple(ends) if end == layers * m else None


def _at(prefix: Sequence[float], end: int, micro_batches: int) -> float:
    """Return the seconds of all layers up to a place."""
    layer, count = divmod(end, micro_batches)
    return prefix[layer] + (count / micro_batches * (prefix[layer + 1] - prefix[layer]) if count else 0.0)


def _micro_batches(which: Which, count: int, micro_batches: int) -> tuple[int, ...]:
    if which == "even":
        return tuple(i for i in range(micro_batches) if (i + 1) * count // micro_batches > i * count // micro_batches)
    return tuple(range(count) if which == "first" else range(micro_batches - count, micro_batches))


def _which(lent: tuple[int, ...], micro_batches: int) -> Which:
    return next((kind for kind in WHICH if _micro_batches(kind, len(lent), micro_batches) == lent), "first")


def _valid(ranks: tuple[int, ...], ends: tuple[int, ...], lent: tuple[tuple[int, ...], ...]) -> StagePlan | None:
    starts, before = (0, *ends), ((), *lent)
    for stage, end in enumerate(ends):
        size = end - starts[stage]
        if size < 1 or (size == 1 and before[stage] and not {*before[stage]} <= {*(*lent, ())[stage]}):
            return None
    return StagePlan(ranks, ends, lent)
