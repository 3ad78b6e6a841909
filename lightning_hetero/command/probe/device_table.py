"""Build the table of ``lightning-hetero probe``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from lightning_hetero.balance.device_report import DeviceReport

__all__ = ["device_table"]

_GIB = 2**30
_UNKNOWN = "-"


def device_table(reports: Sequence[DeviceReport], shares: Sequence[float]) -> Table:
    """Build the table of devices; a column whose value is unknown for all devices is left out.

    Args:
        reports: Reports on the devices.
        shares: Share of each device; 0 for a device that takes no part.
    """
    columns: list[tuple[str, list[str]]] = [
        ("GiB free", [_of_maximum(r.free_bytes, r.memory_bytes, _GIB) for r in reports]),
        ("GHz now", [_of_maximum(r.clock_mhz, r.max_clock_mhz, 1e3) for r in reports]),
        ("busy", [_UNKNOWN if r.utilisation is None else f"{r.utilisation:.0%}" for r in reports]),
        ("temp C", [_UNKNOWN if r.temperature_c is None else str(r.temperature_c) for r in reports]),
        ("samples/s", [f"{r.measured.samples_per_s:.0f}" if r.measured else _UNKNOWN for r in reports]),
        ("share", [f"{share:g}" if share else _UNKNOWN for share in shares]),
    ]
    table = Table()
    table.add_column("device", no_wrap=True)
    table.add_column("name", overflow="fold")
    known = [column for column in columns if set(column[1]) != {_UNKNOWN}]
    for heading, _ in known:
        table.add_column(heading, justify="right")
    for row, report in enumerate(reports):
        table.add_row(report.device, _name(report), *(cells[row] for _, cells in known))
    return table


def _name(report: DeviceReport) -> str:
    if report.logical_cores is None:
        return report.name
    cores = "1 core" if report.logical_cores == 1 else f"{report.logical_cores} cores"
    return f"{report.name}, {cores}"


def _of_maximum(now: float | None, most: float | None, unit: float) -> str:
    """Return a value and its maximum in a unit, both with one decimal."""
    if now is None and most is None:
        return _UNKNOWN
    if most is None:
        return f"{(now or 0) / unit:.1f}"
    return f"{_UNKNOWN if now is None else f'{now / unit:.1f}'}/{most / unit:.1f}"
