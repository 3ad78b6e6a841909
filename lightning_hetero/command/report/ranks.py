"""Which ranks the charts show, in which colours, under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.record.run_record import RunWindow
from lightning_hetero.balance.record.run_summary import slowest_and_fastest
from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.command.report.svg import SERIES, clean

__all__ = ["MOST_RANKS", "ShownRanks", "shown_ranks"]

MOST_RANKS = 32
_MOST_CHARACTERS = 28


@dataclass(frozen=True)
class ShownRanks:
    """The ranks that charts show.

    Attributes:
        ranks: which, the slow ones first where some are left out.
        world_size: of how many.
        colours: of each shown rank: one each, or one for each model of device where there are more than colours.
        legend: name and colour of each.
    """

    ranks: tuple[int, ...]
    world_size: int
    colours: dict[int, str]
    legend: tuple[tuple[str, str], ...]

    @property
    def note(self) -> str:
        """Which ranks are left out, as a sentence; empty where none are."""
        if len(self.ranks) == self.world_size:
            return ""
        half = MOST_RANKS // 2
        return f"Of {self.world_size} ranks the {half} slowest and the {half} fastest are shown."


def shown_ranks(devices: Sequence[DeviceProfile], window: RunWindow | None) -> ShownRanks:
    """Choose the ranks to show.

    Args:
        devices: of all ranks.
        window: tells how fast they are; without it the first and the last ranks stand for all.
    """
    everyone = range(len(devices))
    if window is not None:
        slow, fast = slowest_and_fastest(window, MOST_RANKS)
        ranks = (*slow, *fast)
    elif len(everyone) <= MOST_RANKS:
        ranks = tuple(everyone)
    else:
        ranks = (*everyone[: MOST_RANKS // 2], *everyone[-MOST_RANKS // 2 :])
    if len(ranks) <= len(SERIES):
        colours = {rank: SERIES[i] for i, rank in enumerate(ranks)}
        legend = tuple((f"rank {rank}: {_short(devices[rank].name)}", colours[rank]) for rank in ranks)
        return ShownRanks(ranks, len(devices), colours, legend)
    models = list(dict.fromkeys(devices[rank].name for rank in ranks))
    colour_of = {model: SERIES[min(i, len(SERIES) - 1)] for i, model in enumerate(models)}
    kept = models if len(models) <= len(SERIES) else models[: len(SERIES) - 1]
    legend = tuple((_short(model), colour_of[model]) for model in kept)
    if len(kept) < len(models):
        legend = (*legend, ("other devices", SERIES[-1]))
    return ShownRanks(ranks, len(devices), {rank: colour_of[devices[rank].name] for rank in ranks}, legend)


def _short(name: str) -> str:
    return clean(name, _MOST_CHARACTERS) or "unnamed device"
