"""One process group on the hosts of all ranks, for everything that is neither a gradient nor an activation.

A backend for devices sends objects through the memory of devices, and its hosts wait for their devices.  gloo exchanges
CPU tensors without any device, it tells of dead peers by errors, and it has float64, which some devices lack.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

__all__ = [
    "close_host_group",
    "gloo_is_used",
    "group_for",
    "group_of",
    "has_own_group",
    "host_group",
    "host_timeout",
    "is_initialized",
]


@dataclass
class _Known:
    """The host group of a default group, with which it ends.

    torch keeps both alive. A group that something else keeps may end the process with an error when the interpreter
    shuts down.
    """

    default: weakref.ref[dist.ProcessGroup]
    host: weakref.ref[dist.ProcessGroup]
    timeout: timedelta


_known: list[_Known] = []  # of this process's latest run


def is_initialized() -> bool:
    """Return whether this process is a rank of a process group."""
    return dist.is_available() and dist.is_initialized()


def host_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Return the group in which the hosts of all ranks communicate.

    That is the default group if gloo communicates there for tensors of the CPU. Otherwise the first call makes a group,
    so every rank must make it at the same point.

    Args:
        timeout: How long ranks wait for each other in a group that is made now; None for torch's default.
    """
    group = _current()
    if group is None:
        default, timeout = dist.group.WORLD, timeout or default_pg_timeout
        assert default is not None
        group = default if _has_gloo_on_hosts(default) else _made(default, timeout)
        _known[:] = [_Known(weakref.ref(default), weakref.ref(group), timeout)]
    return group


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group in which the ranks of ``group`` exchange objects: the host group if they are all ranks."""
    if group is None or dist.get_process_group_ranks(group) == [*range(dist.get_world_size())]:
        return host_group()
    return group


def group_for(tensor: torch.Tensor) -> dist.ProcessGroup | None:
    """Return the group of all ranks that carries a tensor; None for the default group, as torch calls it.

    Lightning moves the states of optimisers to the host when a run ends, and they may still be exchanged then.
    """
    return host_group() if tensor.device.type == "cpu" else None


def host_timeout() -> timedelta:
    """Return how long the ranks wait for each other in the host group."""
    return _known[0].timeout if _current() is not None else default_pg_timeout


def gloo_is_used() -> bool:
    """Return whether gloo's threads serve a group that :func:`close_host_group` closes."""
    return has_own_group() or (is_initialized() and dist.get_backend() == "gloo")


def has_own_group() -> bool:
    """Return whether the host group is another than the default group."""
    return is_initialized() and _own_group() is not None


def close_host_group() -> None:
    """Close the group that gloo's threads serve, since this process exits.

    A default group of another backend stays open; it is left to its owner.
    """
    own = _own_group()
    _known.clear()
    dist.destroy_process_group(own)


def _own_group() -> dist.ProcessGroup | None:
    """Return the host group if it is not the default group of this process; None otherwise."""
    host = _current()
    return None if host is dist.group.WORLD else host


def _current() -> dist.ProcessGroup | None:
    """Return the host group of the current default group; None if there is none yet."""
    default = dist.group.WORLD
    # another run in this process has other groups
    return _known[0].host() if _known and default is not None and _known[0].default() is default else None


def _has_gloo_on_hosts(group: dist.ProcessGroup) -> bool:
    return "cpu:gloo" in dist.get_backend_config(group).split(",")


def _made(default: dist.ProcessGroup, timeout: timedelta) -> dist.ProcessGroup:
    # torch binds a new group to the device of the default group, whatever devices its backend has
    device: torch.device | None = default.bound_device_id
    default.bound_device_id = None
    try:
        made: dist.ProcessGroup = dist.new_group(
            backend="cpu:gloo", timeout=timeout, group_desc="hosts of lightning_hetero"
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"The hosts of all ranks must reach each other through gloo, got {error}. Name the network interface that"
            f" connects them in the environment variable GLOO_SOCKET_IFNAME."
        ) from error
    finally:
        default.bound_device_id = device
    return made
