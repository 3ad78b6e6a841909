"""Read the limits that a control group (of a container or a batch system) sets for this process.

Both versions of the interface are read, from the group of this process up to the root; the tightest limit applies.
Linux describes them in ``Documentation/admin-guide/cgroup-v2.rst`` and ``Documentation/admin-guide/cgroup-v1/``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_quota", "memory_limit"]


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores the process may use at a time; None if there is no quota.

    Args:
        root: Folder that contains ``proc`` and ``sys``.
    """
    quotas = []
    for folder in _folders(root, "cpu"):
        quota_us, _, period_us = _text(folder / "cpu.max").partition(" ")
        quota_us = quota_us or _text(folder / "cpu.cfs_quota_us")
        period_us = period_us or _text(folder / "cpu.cfs_period_us")
        # "max" and -1 stand for no quota
        if quota_us.isdecimal() and period_us.isdecimal() and int(quota_us) and int(period_us):
            quotas.append(int(quota_us) / int(period_us))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> tuple[int, int] | None:
    """Return the memory limit of the process and what is left of it, in bytes; None if there is no limit.

    Args:
        root: Folder that contains ``proc`` and ``sys``.
    """
    limits = []
    for folder in _folders(root, "memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdecimal() and int(limit):
            held = int(used) - _reclaimable_bytes(folder) if used.isdecimal() else 0
            limits.append((int(limit), max(int(limit) - held, 0)))
    return (min(limit for limit, _ in limits), min(left for _, left in limits)) if limits else None


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of its parents, as far as they are visible."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            top = mount
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue
        # a container sees its own group at the top, whatever its name outside
        folder = top / group.lstrip("/")
        while folder != top:
            yield folder
            folder = folder.parent
        yield top


def _reclaimable_bytes(folder: Path) -> int:
    """Return the memory that counts as used but that the kernel can reclaim: inactive pages of files."""
    statistics = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    value = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return int(value) if value.isdecimal() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
