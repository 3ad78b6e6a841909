"""Print the table of ranks once the shares are found."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from lightning_hetero.balance.record.run_summary import measured_speed_up
from lightning_hetero.balance.types import DeviceProfile, WindowTiming

__all__ = ["balance_table", "print_balance"]


def balance_table(
    profiles: Sequence[DeviceProfile], before: Sequence[WindowTiming], after: Sequence[WindowTiming]
) -> Table:
    """Return a table that compares each rank's step before and after the change of shares.

    Args:
        profiles: Device of each rank, shape ``(world_size,)``.
        before: Timing of each rank under the plan that was measured first.
        after: Timing of each rank under the plan that was found.
    """
    table = Table()
    table.add_column("rank", justify="right")
    table.add_column("host", max_width=12, overflow="ellipsis", no_wrap=True)
    table.add_column("device", max_width=20, overflow="fold")
    for heading in ("samples", "own ms", "waiting ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, (profile, old, new) in enumerate(zip(profiles, before, after, strict=True)):
        table.add_row(
            str(rank),
            profile.host,
            profile.name if profile.device == "cpu" else f"{profile.device} {profile.name}",
            f"{old.samples} -> {new.samples}",
            f"{old.own_s * 1e3:.1f} -> {new.own_s * 1e3:.1f}",
            f"{old.waiting_s * 1e3:.1f} -> {new.waiting_s * 1e3:.1f}",
        )
    return table


def print_balance(
    trainer: Trainer, profiles: Sequence[DeviceProfile], before: Sequence[WindowTiming], after: Sequence[WindowTiming]
) -> None:
    """Print the table and the speed-up, as wide as the terminal, or 80 columns wide if there is none."""
    console = Console()
    console = Console(width=None if console.is_terminal else 80, highlight=False)
    bar = trainer.progress_bar_callback
    with console.capture() if bar is not None else nullcontext() as captured:
        console.print("hetero_ddp: own time of each rank per step, and waiting for the other ranks")
        console.print(balance_table(profiles, before, after))
        console.print(f"speed-up {measured_speed_up(before, after):.2f} (samples/s after the change / before)")
    if bar is not None and captured is not None:
        bar.print(captured.get().rstrip())
