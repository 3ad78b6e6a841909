"""Note what slows the devices of a machine down."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.device_report import DeviceReport

__all__ = ["device_notes"]

# Fraction of a device above which use by others is worth a note.
_NOTICEABLE = 0.1
# Spread of the repetitions above which a measurement is worth a note.
_UNSTEADY = 0.2
_GIB = 2**30


def device_notes(reports: Sequence[DeviceReport]) -> tuple[str, ...]:
    """Return one note on each thing that a user might not expect, in the order of the devices."""
    notes: list[str] = []
    for report in reports:
        notes += [*_throttled(report), *_shared(report), *_quota(report), *_unsteady(report)]
    return (*notes, *_backends(reports))


def _throttled(report: DeviceReport) -> list[str]:
    return [f"{report.device} is throttled now: {', '.join(report.throttled)}."] if report.throttled else []


def _shared(report: DeviceReport) -> list[str]:
    if report.is_processor:
        if (report.utilisation or 0) < _NOTICEABLE:
            return []
        return [
            f"Other processes keep the processor {report.utilisation:.0%} busy, which slows down every rank on this"
            " machine."
        ]
    if report.other_processes:
        who = "1 other process" if report.other_processes == 1 else f"{report.other_processes} other processes"
        what = f" ({report.other_bytes / _GIB:.1f} GiB)" if report.other_bytes else ""
        return [f"{report.device} is shared with {who}{what}{_busy(report)}."]
    if report.memory_bytes and report.free_bytes is not None:
        taken = report.memory_bytes - report.free_bytes
        if taken > _NOTICEABLE * report.memory_bytes:
            # inside a container the driver does not name processes outside it
            return [
                f"Processes that cannot be seen from here use {taken / _GIB:.1f} GiB of {report.device}{_busy(report)}."
            ]
    return [f"{report.device} is busy: {report.utilisation:.0%}."] if (report.utilisation or 0) >= _NOTICEABLE else []


def _busy(report: DeviceReport) -> str:
    return f", which is {report.utilisation:.0%} busy" if (report.utilisation or 0) >= _NOTICEABLE else ""


def _quota(report: DeviceReport) -> list[str]:
    usable, cores = report.usable_cores, report.logical_cores
    if usable is None or cores is None or usable >= cores:
        return []
    return [
        f"This process may use {usable:g} of {cores} cores (CPU affinity or the quota of a container); "
        f"more threads would only slow each other down."
    ]


def _unsteady(report: DeviceReport) -> list[str]:
    if report.measured is None or report.measured.spread < _UNSTEADY:
        return []
    return [
        f"The repetitions on {report.device} vary by {report.measured.spread:.0%}, so its speed is a rough estimate; "
        "measure again when nothing else is running, or for longer (--seconds)."
    ]


def _backends(reports: Sequence[DeviceReport]) -> list[str]:
    vendors = sorted({report.vendor for report in reports if report.vendor and not report.is_processor})
    if len(vendors) < 2:
        return []
    return [
        f"Devices of {' and '.join(vendors)} can train together only over gloo: "
        'HeteroDDPStrategy(process_group_backend="gloo"), with a build of torch for the vendor of each.'
    ]
