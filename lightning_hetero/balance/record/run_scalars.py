"""What a window of measured steps looks like in a logger: a few named numbers, however many ranks there are."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lightning_hetero.balance.record.run_record import RunWindow
from lightning_hetero.balance.record.run_summary import efficiency, samples_per_s, step_s, wait_fractions

__all__ = ["scalars_of"]

# Of more ranks a logger gets the extremes and the mean: thousands of curves help nobody.
_MOST_RANKS = 32


def scalars_of(window: RunWindow) -> dict[str, float]:
    """Return what to log.

    Args:
        window: in which every rank has measured steps.

    Returns:
        ``hetero/step_time_s``, ``hetero/samples_per_s`` and ``hetero/efficiency``; and for each rank
        ``hetero/share/rank_0`` (its part of the global batch), ``hetero/own_s/rank_0`` and
        ``hetero/waiting_fraction/rank_0``, or ``.../min``, ``.../mean`` and ``.../max`` where there are more than 32
        ranks. They are the figures of a report.
    """
    batch = sum(window.samples)
    scalars = {"hetero/step_time_s": step_s(window), "hetero/samples_per_s": samples_per_s(window)}
    part_of_bound = efficiency(window)
    if part_of_bound is not None:
        scalars["hetero/efficiency"] = part_of_bound
    _add(scalars, "hetero/share", [n / batch for n in window.samples])
    _add(scalars, "hetero/own_s", window.own_s)
    _add(scalars, "hetero/waiting_fraction", [part for part in wait_fractions(window) if part is not None])
    return scalars


def _add(scalars: dict[str, float], name: str, values: Sequence[float]) -> None:
    if len(values) <= _MOST_RANKS:
        scalars.update({f"{name}/rank_{rank}": value for rank, value in enumerate(values)})
    else:
        scalars.update({f"{name}/min": min(values), f"{name}/mean": fmean(values), f"{name}/max": max(values)})
