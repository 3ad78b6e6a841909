"""The table that is printed once the shares are found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_hetero.balance.summary import RankStatus, speed_up
from lightning_hetero.balance.types import DeviceProfile

__all__ = ["balance_table", "print_table"]


def balance_table(
    profiles: Sequence[DeviceProfile], before: Sequence[RankStatus], after: Sequence[RankStatus]
) -> Table:
    """Build the table of what each rank does before and after the change of shares.

    Args:
        profiles: what each rank runs on, shape ``(world_size,)``.
        before: each rank under the initial plan.
        after: each rank under the plan that was found.
    """
    table = Table(
        title=f"hetero_ddp: {speed_up(before, after):.2f}x as many samples/s",
        caption="ms a step: own work, then waiting for the other ranks; before -> after",
    )
    table.add_column("rank", justify="right")
    table.add_column("host", max_width=14, overflow="ellipsis", no_wrap=True)
    table.add_column("device", max_width=22, overflow="fold")
    for heading in ("samples", "own ms", "waiting ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, (profile, old, new) in enumerate(zip(profiles, before, after, strict=True)):
        table.add_row(
            str(rank),
            profile.host,
            f"{profile.device} {profile.name}",
            f"{old.samples} -> {new.samples}",
            f"{old.own_s * 1e3:.1f} -> {new.own_s * 1e3:.1f}",
            f"{old.waiting_s * 1e3:.1f} -> {new.waiting_s * 1e3:.1f}",
        )
    return table


def print_table(table: Table) -> None:
    """Print ``table``; on a terminal no wider than the terminal, elsewhere in 80 columns."""
    console = Console()
    Console(width=None if console.is_terminal else 80).print(table)
