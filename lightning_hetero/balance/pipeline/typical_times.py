"""Tell from some short runs of each layer what it takes within a long run of passes.

A device may be shared. A quota of a container, or the time slices of a GPU, let it work for some milliseconds and then
make it wait. Many runs of a single layer end before it has to, so their median is the time of a device that works all
the time, and in a training the device is slower. The mean of all runs shows by how much. So on such a device, the
shorter runs tell how layers compare with each other, and the mean of all runs of all layers tells the scale. Otherwise
medians are used, which single disturbances do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["LayerRuns", "PassSeconds", "typical_times"]

# A device whose runs take so many times as long on average as the shorter of them is shared.
_SHARED = 1.15
# The part of the layers, those with the longest runs for their kind, that counts as disturbed.
_DISTURBED = 0.1
# Of so many layers or more, at least one counts so.
_FEW = 3


@dataclass(frozen=True)
class PassSeconds:
    """What a layer takes for one micro-batch.

    Attributes:
        forward_s: Seconds of the forward pass.
        backward_s: Seconds of the backward pass.
        input_s: Seconds of the first part of a backward pass in two parts; otherwise those of the whole.
        weight_s: Seconds of the second part; 0 if a backward pass is not split.
    """

    forward_s: float
    backward_s: float
    input_s: float
    weight_s: float


@dataclass(frozen=True)
class LayerRuns:
    """The seconds of each run of a layer, one after another.

    Attributes:
        forward_s: Seconds of the forward passes.
        backward_s: Seconds of the backward passes, as many.
        input_s: Seconds of the first part of backward passes in two parts; empty if the layer has none.
        weight_s: Seconds of the second part, as many.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    input_s: tuple[float, ...] = ()
    weight_s: tuple[float, ...] = ()

    @property
    def passes(self) -> tuple[tuple[float, ...], ...]:
        """The runs of each kind of pass."""
        return self.forward_s, self.backward_s, self.input_s, self.weight_s


def typical_times(layers: Sequence[LayerRuns]) -> list[PassSeconds]:
    """Return what each layer takes within a long run of passes.

    Args:
        layers: The runs of each layer on one device, at least one of each.

    Example:
        >>> from lightning_hetero.balance.pipeline.typical_times import LayerRuns, typical_times
        >>> often_waits = LayerRuns((1.0, 1.0, 3.0, 1.0), (1.0, 3.0, 1.0, 1.0))
        >>> typical_times([often_waits] * 8)[0]
        PassSeconds(forward_s=1.5, backward_s=1.5, input_s=1.5, weight_s=0.0)
    """
    factor = _times_as_long(layers)
    found = []
    for layer in layers:
        if factor > _SHARED:
            forward, backward, first, second = (factor * _short(runs) for runs in layer.passes)
        else:
            forward, backward, first, second = (median(runs) if runs else 0.0 for runs in layer.passes)
        found.append(PassSeconds(forward, backward, first if layer.input_s else backward, second))
    return found


def _times_as_long(layers: Sequence[LayerRuns]) -> float:
    """Return how many times as long as its short runs all runs take on average, without disturbed layers."""
    rows = []
    for layer in layers:
        short_s = len(layer.forward_s) * (_short(layer.forward_s) + _short(layer.backward_s))
        if short_s > 0:
            rows.append((sum(layer.forward_s) + sum(layer.backward_s), short_s))
    rows.sort(key=lambda row: row[0] / row[1])
    kept = rows[: len(rows) - max(round(_DISTURBED * len(rows)), 1)] if len(rows) >= _FEW else rows
    return sum(all_s for all_s, _ in kept) / sum(short_s for _, short_s in kept) if kept else 1.0


def _short(runs: Sequence[float]) -> float:
    """Return the lower quartile, of few runs the shortest."""
    return sorted(runs)[len(runs) // 4] if runs else 0.0
