"""Summarise the record of a run: throughput before and after, waiting per rank, distance from the bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from statistics import fmean, median
from typing import Literal, TypeVar

from lightning_hetero.balance.record.run_record import RunRecord, RunWindow
from lightning_hetero.balance.types import WindowTiming

__all__ = [
    "Comparison",
    "State",
    "StepParts",
    "bound_samples_per_s",
    "compare",
    "measured_efficiency",
    "measured_speed_up",
    "plans_over_steps",
    "run_status",
    "samples_per_s",
    "scalars_of",
    "slowest_and_fastest",
    "step_parts",
    "step_s",
    "thinned",
    "wait_fractions",
]

State = Literal["tuning", "watching", "finished", "failed", "no end recorded"]

_T = TypeVar("_T")
# no clock measures a shorter time; a smaller value means that nothing was measured
_MIN_S = 1e-9
# number of windows from which the throughput under the tuned shares is taken
_TUNED_WINDOWS = 5
# With more ranks, loggers get only the extremes and the mean: nobody can read thousands of curves.
_MAX_LOGGED_RANKS = 32


def run_status(record: RunRecord, is_running: bool = False) -> State:
    """Return the state of the run.

    Args:
        record: Record of the run.
        is_running: Whether a run without an end is known to continue; otherwise its process may have been killed.
    """
    if record.end is not None:
        return "finished" if record.end.reason == "finished" else "failed"
    if not is_running:
        return "no end recorded"
    if record.windows:
        return "tuning" if record.windows[-1].tuning else "watching"
    return "tuning" if record.advice is None and record.stages is None else "watching"


def step_s(window: RunWindow) -> float:
    """Return the seconds per step; 0 if nothing was measured."""
    return _slowest_s(window.own_s, window.waiting_s)


def samples_per_s(window: RunWindow) -> float:
    """Return the samples that all ranks together process per second; 0 if nothing was measured."""
    seconds = step_s(window)
    return sum(window.samples) / seconds if seconds else 0.0


def measured_speed_up(before: Sequence[WindowTiming], after: Sequence[WindowTiming]) -> float:
    """Return the samples per second after a change, divided by those before.

    Args:
        before: One window per rank before the change, shape ``(world_size,)``.
        after: One window per rank after the change, shape ``(world_size,)``.
    """
    rates = [
        sum(window.samples for window in windows)
        / max(_slowest_s([w.own_s for w in windows], [w.waiting_s for w in windows]), _MIN_S)
        for windows in (before, after)
    ]
    return rates[1] / rates[0]


def _slowest_s(own_s: Sequence[float], waiting_s: Sequence[float]) -> float:
    """Return the seconds per step; ranks finish together, so their measurements differ by noise only."""
    both = zip(own_s, waiting_s, strict=True)
    return max((own + waiting for own, waiting in both if own >= _MIN_S), default=0.0)


def bound_samples_per_s(window: RunWindow) -> float | None:
    """Return the bound, the sum of what each rank would process per second alone; None unless all were measured."""
    if not _is_complete(window):
        return None
    # a rank without a sample adds nothing
    return sum(n / own_s for n, own_s in zip(window.samples, window.own_s, strict=True) if n)


def measured_efficiency(window: RunWindow) -> float | None:
    """Return the samples per second divided by the bound, at most 1; None unless all ranks were measured."""
    bound = bound_samples_per_s(window)
    return samples_per_s(window) / bound if bound else None


def _is_complete(window: RunWindow) -> bool:
    return any(window.samples) and all(
        own_s >= _MIN_S for n, own_s in zip(window.samples, window.own_s, strict=True) if n
    )


@dataclass(frozen=True)
class Comparison:
    """Measured windows of a run: the first, some after the tuning, and the last.

    Attributes:
        before: First window.
        after: Last window; the same object if there is only one.
        tuned: First windows under the shares that the tuning has found; empty before that, and if nothing was tuned.
            They show the effect of the tuning better than the last window, because speeds may have changed since.
    """

    before: RunWindow
    after: RunWindow
    tuned: tuple[RunWindow, ...] = ()

    @property
    def tuned_samples_per_s(self) -> float | None:
        """Samples per second right after the tuning, as the median of ``tuned``; None if it is empty."""
        return median(map(samples_per_s, self.tuned)) if self.tuned else None

    @property
    def speed_up(self) -> float | None:
        """Samples per second after the tuning, divided by those before; None if nothing was tuned, or not yet."""
        rate = self.tuned_samples_per_s
        return None if rate is None else rate / samples_per_s(self.before)

    @property
    def from_equal_shares(self) -> bool:
        """Whether the first window had equal shares, up to rounding to whole samples, as with ``ddp``."""
        return max(self.before.samples) - min(self.before.samples) <= 1


def compare(record: RunRecord) -> Comparison | None:
    """Return the first window in which every rank was measured, some after the tuning, and the last.

    If there is no such window, windows in which some rank was measured count. None if no rank ever was.
    """
    measured = [window for window in record.windows if _is_complete(window)]
    if not measured:
        measured = [window for window in record.windows if samples_per_s(window)]
    if not measured:
        return None
    settled = list(dropwhile(lambda window: window.tuning, measured)) if measured[0].tuning else []
    tuned = takewhile(lambda window: window.samples == settled[0].samples, settled[:_TUNED_WINDOWS])
    return Comparison(measured[0], measured[-1], tuple(tuned))


@dataclass(frozen=True)
class StepParts:
    """The parts of a rank's step, in seconds.

    Attributes:
        own_s: Own time of the rank.
        communication_s: Seconds that a step takes in addition to the slowest rank's own time.
        waiting_s: Seconds of waiting for slower ranks.
    """

    own_s: float
    communication_s: float
    waiting_s: float


def step_parts(window: RunWindow) -> list[StepParts]:
    """Return the parts of each rank's step, shape ``(world_size,)``.

    A rank measures everything but its own time as one number. The communication time, which all ranks determine
    together, is a part of it.
    """
    parts = []
    for own_s, rest_s in zip(window.own_s, window.waiting_s, strict=True):
        communication_s = min(window.communication_s, rest_s)
        parts.append(StepParts(own_s, communication_s, rest_s - communication_s))
    return parts


def wait_fractions(window: RunWindow) -> list[float | None]:
    """Return the fraction of a step that each rank did not work; None for a rank that measured nothing."""
    return [
        waiting_s / (own_s + waiting_s) if own_s >= _MIN_S else None
        for own_s, waiting_s in zip(window.own_s, window.waiting_s, strict=True)
    ]


def plans_over_steps(record: RunRecord) -> list[tuple[int, tuple[int, ...]]]:
    """Return pairs of a first step and the mini-batch sizes of all ranks from it on, in ascending order of steps.

    The plan before the first change is that of the first window, if that was measured before the change.
    """
    plans: dict[int, tuple[int, ...]] = {}
    first_change = min((change.step for change in record.changes), default=None)
    if record.windows and (first_change is None or record.windows[0].step < first_change):
        plans[0] = record.windows[0].samples
    for change in record.changes:
        # a later decision replaces changes that were due at its step or after it
        plans = {step: samples for step, samples in plans.items() if step < change.step}
        plans[change.step] = change.samples
    return list(plans.items())


def slowest_and_fastest(window: RunWindow, most: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return up to ``most`` ranks: all of them, or half as many of the slowest and half of the fastest.

    Args:
        window: Window that ranks them by own time per sample; ranks that measured nothing come last.
        most: Largest number of ranks, which must be even.

    Returns:
        The slow ranks and the fast ones, each in ascending order. If none is left out, all are in the first tuple.
    """
    ranks = range(len(window.samples))
    if len(ranks) <= most:
        return tuple(ranks), ()

    def seconds_per_sample(rank: int) -> float:
        samples, own_s = window.samples[rank], window.own_s[rank]
        return own_s / samples if samples and own_s >= _MIN_S else -1.0

    order = sorted(ranks, key=lambda rank: (-seconds_per_sample(rank), rank))
    measured = [rank for rank in order if seconds_per_sample(rank) >= 0]
    fast = measured[max(len(measured) - most // 2, most // 2) :]
    return tuple(sorted(order[: most // 2])), tuple(sorted(fast))


def thinned(items: Sequence[_T], most: int) -> list[_T]:
    """Return at most ``most`` items, evenly spread and including the first and the last.

    Example:
        >>> thinned(range(10), 4)
        [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def scalars_of(window: RunWindow) -> dict[str, float]:
    """Return the scalars to log for a window.

    Args:
        window: Window in which every rank has measured steps.

    Returns:
        The values of ``hetero/step_time_s``, ``hetero/samples_per_s`` and ``hetero/efficiency``; and for each rank
        ``hetero/share/rank_0`` (its part of the global batch), ``hetero/own_s/rank_0`` and
        ``hetero/waiting_fraction/rank_0``. With more than 32 ranks, ``.../min``, ``.../mean`` and ``.../max`` replace
        the values per rank. A report shows the same figures.
    """
    batch = sum(window.samples)
    scalars = {"hetero/step_time_s": step_s(window), "hetero/samples_per_s": samples_per_s(window)}
    efficiency = measured_efficiency(window)
    if efficiency is not None:
        scalars["hetero/efficiency"] = efficiency
    _add_scalars(scalars, "hetero/share", [n / batch for n in window.samples])
    _add_scalars(scalars, "hetero/own_s", window.own_s)
    _add_scalars(scalars, "hetero/waiting_fraction", [part for part in wait_fractions(window) if part is not None])
    return scalars


def _add_scalars(scalars: dict[str, float], name: str, values: Sequence[float]) -> None:
    if len(values) <= _MAX_LOGGED_RANKS:
        scalars.update({f"{name}/rank_{rank}": value for rank, value in enumerate(values)})
    else:
        scalars.update({f"{name}/min": min(values), f"{name}/mean": fmean(values), f"{name}/max": max(values)})
