"""What a window of measured steps looks like in a logger: a few named numbers, however many ranks there are."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lightning_hetero.balance.run_record import RunWindow

__all__ = ["bound_samples_per_s", "scalars_of"]

# Of more ranks a logger gets the extremes and the mean: thousands of curves help nobody.
_MOST_RANKS = 32


def scalars_of(window: RunWindow) -> dict[str, float]:
    """Return what to log.

    Args:
        window: in which every rank has measured steps.

    Returns:
        ``hetero/step_time_s``, ``hetero/samples_per_s`` and, once step times are fitted, ``hetero/efficiency``; and for
        each rank ``hetero/share/rank_0`` (its part of the global batch), ``hetero/own_s/rank_0`` and
        ``hetero/waiting_fraction/rank_0``, or ``.../min``, ``.../mean`` and ``.../max`` where there are more than 32
        ranks.
    """
    batch = sum(window.samples)
    step_s = [own + waiting for own, waiting in zip(window.own_s, window.waiting_s, strict=True)]
    # all ranks are done together, so the times of their steps differ by noise only
    whole_s = max(step_s)
    scalars = {"hetero/step_time_s": whole_s, "hetero/samples_per_s": batch / whole_s}
    bound = bound_samples_per_s(window)
    if bound is not None:
        scalars["hetero/efficiency"] = batch / whole_s / bound
    _add(scalars, "hetero/share", [n / batch for n in window.samples])
    _add(scalars, "hetero/own_s", window.own_s)
    _add(scalars, "hetero/waiting_fraction", [w / s for w, s in zip(window.waiting_s, step_s, strict=True)])
    return scalars


def bound_samples_per_s(window: RunWindow) -> float | None:
    """Return what all ranks would process together, each alone at the size that it has; None before that is known.

    No division of the batch exceeds it (see ``balance.advice``).
    """
    if not window.overhead_s:
        return None
    times = zip(window.samples, window.overhead_s, window.seconds_per_sample, strict=True)
    return sum(n / max(overhead + cost * n, 1e-12) for n, overhead, cost in times)


def _add(scalars: dict[str, float], name: str, values: Sequence[float]) -> None:
    if len(values) <= _MOST_RANKS:
        scalars.update({f"{name}/rank_{rank}": value for rank, value in enumerate(values)})
    else:
        scalars.update({f"{name}/min": min(values), f"{name}/mean": fmean(values), f"{name}/max": max(values)})
