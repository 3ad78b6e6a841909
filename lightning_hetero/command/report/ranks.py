"""Choose which ranks the charts show, with their colours and names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.record.run_record import RunWindow
from lightning_hetero.balance.record.run_summary import slowest_and_fastest
from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.command.report.svg import SERIES, clean

__all__ = ["MAX_RANKS", "ShownRanks", "shown_ranks"]

MAX_RANKS = 32
_MAX_CHARACTERS = 28


@dataclass(frozen=True)
class ShownRanks:
    """The ranks that the charts show.

    Attributes:
        ranks: Ranks to show; the slow ones come first if some are left out.
        world_size: Number of all ranks.
        colours: Colour of each shown rank; if there are more ranks than colours, one colour per model of device.
        legend: Name and colour of each entry of the legend.
        by_speed: Whether the speed of each rank is known, so that it decides which are left out.
    """

    ranks: tuple[int, ...]
    world_size: int
    colours: dict[int, str]
    legend: tuple[tuple[str, str], ...]
    by_speed: bool = True

    @property
    def note(self) -> str:
        """A note on the ranks that are left out; empty if none are."""
        if len(self.ranks) == self.world_size:
            return ""
        half = MAX_RANKS // 2
        which = (
            f"the {half} slowest and the {half} fastest" if self.by_speed else f"the first {half} and the last {half}"
        )
        return f"Of {self.world_size} ranks, {which} are shown."


def shown_ranks(devices: Sequence[DeviceProfile], window: RunWindow | None) -> ShownRanks:
    """Choose the ranks to show.

    Args:
        devices: Devices of all ranks.
        window: Window that gives the speed of each rank; without it, the first and the last ranks are shown.
    """
    all_ranks = range(len(devices))
    if window is not None:
        slow, fast = slowest_and_fastest(window, MAX_RANKS)
        ranks = (*slow, *fast)
    elif len(all_ranks) <= MAX_RANKS:
        ranks = tuple(all_ranks)
    else:
        ranks = (*all_ranks[: MAX_RANKS // 2], *all_ranks[-MAX_RANKS // 2 :])
    if len(ranks) <= len(SERIES):
        colours = {rank: SERIES[i] for i, rank in enumerate(ranks)}
        legend = tuple((f"rank {rank}: {_short(devices[rank].name)}", colours[rank]) for rank in ranks)
        return ShownRanks(ranks, len(devices), colours, legend, window is not None)
    models = list(dict.fromkeys(devices[rank].name for rank in ranks))
    colour_of = {model: SERIES[min(i, len(SERIES) - 1)] for i, model in enumerate(models)}
    kept = models if len(models) <= len(SERIES) else models[: len(SERIES) - 1]
    legend = tuple((_short(model), colour_of[model]) for model in kept)
    if len(kept) < len(models):
        legend = (*legend, ("other devices", SERIES[-1]))
    colours = {rank: colour_of[devices[rank].name] for rank in ranks}
    return ShownRanks(ranks, len(devices), colours, legend, window is not None)


def _short(name: str) -> str:
    return clean(name, _MAX_CHARACTERS) or "unnamed device"
