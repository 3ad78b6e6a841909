"""Process groups in which one rank sends to another, and never the other way.

NCCL runs the messages of a process group one after another, so a receive that waits for its sender blocks all sends
after it.  In a group of two ranks with one direction, messages cannot block each other: both ranks issue them in the
same order, whatever else they exchange in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist

from lightning_hetero.distributed.host_group import host_timeout

__all__ = ["channel", "open_channels"]

Pair = tuple[int, int]

# By the default group, with which they end; torch keeps them alive. None for channels of other ranks.
_Channels = dict[Pair, weakref.ref[dist.ProcessGroup] | None]
_known: weakref.WeakKeyDictionary[dist.ProcessGroup, _Channels] = weakref.WeakKeyDictionary()


def channel(source: int, target: int) -> dist.ProcessGroup:
    """Return the group in which ``source`` sends to ``target``; :func:`open_channels` must have opened it."""
    reference = _of_default_group()[source, target]
    group = None if reference is None else reference()
    assert group is not None, "it is a channel of this rank and lives as long as the default group"
    return group


def open_channels(ranks: Iterable[int], device: torch.device) -> None:
    """Open the channels between neighbouring stages in both directions; every rank must call this at the same point.

    Args:
        ranks: Rank of each stage, the first stage first.
        device: Device of this rank's tensors.
    """
    known, own = _of_default_group(), dist.get_rank()
    before = None
    pairs: set[Pair] = set()
    for rank in ranks:
        if before is not None and before != rank:
            pairs |= {(before, rank), (rank, before)}
        before = rank
    new = sorted(pairs - known.keys())
    for pair in new:
        group = dist.new_group(sorted(pair), timeout=host_timeout())
        known[pair] = weakref.ref(group) if own in pair else None
    # NCCL connects two ranks with their first message and blocks the host until both take part. They do so now, in one
    # order, since in a step one of them might wait for the other elsewhere.
    for source, target in new:
        if own == source:
            dist.send(torch.zeros(1, device=device), target, group=channel(source, target))
        elif own == target:
            dist.recv(torch.empty(1, device=device), source, group=channel(source, target))


def _of_default_group() -> _Channels:
    default = dist.group.WORLD
    assert default is not None
    return _known.setdefault(default, {})
