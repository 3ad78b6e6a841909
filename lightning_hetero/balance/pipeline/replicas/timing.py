"""Time many divisions of one pipeline at once.

The steps of a pipeline with as many stages and micro-batches have the same passes in the same order, whatever the
stages take. So one run over these passes, in which each number is an array with one entry per division, gives the times
of all of them. ``simulation`` does the same for one division, with all details.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.balance.pipeline.orders.order import known_order
from lightning_hetero.balance.pipeline.simulation import PassTimes, simulate_order
from lightning_hetero.balance.pipeline.stages import Schedule, StageTimes

__all__ = ["Floats", "stage_ends_s"]

Floats = NDArray[np.float64]

_PERIOD = 60  # micro-batches after which what they add repeats: exact for up to 6 stages, and nearly for more
_BEFORE_OF_STAGE = 4  # micro-batches before that, per stage


def stage_ends_s(
    forward_s: Floats, backward_s: Floats, transfer_s: Floats, micro_batches: int, schedule: Schedule
) -> Floats:
    """Return when the last pass of each stage ends, shape ``(divisions, num_stages)``.

    Args:
        forward_s: Seconds of a forward pass of each stage, shape ``(divisions, num_stages)``.
        backward_s: Seconds of a backward pass.
        transfer_s: Seconds that a transfer from each stage to the next takes, shape ``(divisions, num_stages - 1)``.
        micro_batches: Number of micro-batches per step.
        schedule: Pipeline schedule.
    """
    num_stages = forward_s.shape[1]
    if num_stages == 1:
        return micro_batches * (forward_s + backward_s)
    before = _PERIOD + _BEFORE_OF_STAGE * num_stages
    if micro_batches <= before:
        return _simulated_s(forward_s, backward_s, transfer_s, micro_batches, schedule)
    # every further period adds the same time
    periods, rest = divmod(micro_batches - before, _PERIOD)
    counts = (before + rest - _PERIOD, before + rest)
    fewer, more = (_simulated_s(forward_s, backward_s, transfer_s, count, schedule) for count in counts)
    return np.asarray(more + periods * (more - fewer))


def _simulated_s(
    forward_s: Floats, backward_s: Floats, transfer_s: Floats, micro_batches: int, schedule: Schedule
) -> Floats:
    num_stages = forward_s.shape[1]
    seconds = {"forward": np.ascontiguousarray(forward_s.T), "backward": np.ascontiguousarray(backward_s.T)}
    between = np.ascontiguousarray(transfer_s.T)
    free_at = list(np.zeros_like(seconds["forward"]))
    ready_at: dict[tuple[str, int, int], Floats] = {}  # when a result has reached the stage that waits for it
    for kind, stage, i in _passes(num_stages, micro_batches, schedule):
        start_s = free_at[stage]
        needed = ready_at.pop((kind, stage, i), None)
        if needed is not None:
            start_s = np.maximum(start_s, needed)
        free_at[stage] = end_s = start_s + seconds[kind][stage]
        target = stage + 1 if kind == "forward" else stage - 1
        if 0 <= target < num_stages:
            ready_at[kind, target, i] = end_s + between[min(stage, target)]
    return np.stack(free_at, axis=1)


@lru_cache(maxsize=256)
def _passes(num_stages: int, micro_batches: int, schedule: Schedule) -> tuple[tuple[str, int, int], ...]:
    """Return all passes in an order in which each comes after those that it waits for."""
    order = known_order(range(num_stages), micro_batches, schedule)
    times = PassTimes.of_stages(StageTimes((1.0,) * num_stages, (1.0,) * num_stages), micro_batches)
    passes = sorted(simulate_order(order, times).passes, key=lambda p: p.start_s)
    return tuple((p.kind, p.stage, p.micro_batch) for p in passes)
