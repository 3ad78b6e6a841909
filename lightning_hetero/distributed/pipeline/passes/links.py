"""Time messages between two ranks: what each of them takes, and what each further byte takes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist

from lightning_hetero.distributed.collectives import all_wait
from lightning_hetero.hardware.timed_call import timed_call

__all__ = ["pairs_of_links", "timed_link"]

_PINGS = 7
_SMALL_BYTES, _LARGE_BYTES = 1 << 10, 1 << 22


def pairs_of_links(nodes: Sequence[int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Return two ranks of one node and two of different nodes, given the node of each rank; None where there are none.

    Example:
        >>> pairs_of_links([0, 0, 1, 1])
        ((0, 1), (0, 2))
    """
    ranks = range(len(nodes))
    pairs = [(a, b) for a in ranks for b in ranks if a < b]
    within = next((pair for pair in pairs if nodes[pair[0]] == nodes[pair[1]]), None)
    between = next((pair for pair in pairs if nodes[pair[0]] != nodes[pair[1]]), None)
    return within, between


def timed_link(pair: tuple[int, int] | None, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a message and of each byte between two ranks; every rank must call this at the same point.

    Args:
        pair: The two ranks; None to time nothing.
        device: Device of this rank.

    Returns:
        The two times as measured by this rank; 0 on ranks that are not in ``pair``.
    """
    all_wait()
    rank = dist.get_rank()
    if pair is None or rank not in pair:
        return 0.0, 0.0
    other = pair[1] if rank == pair[0] else pair[0]
    seconds = []
    for size in (_SMALL_BYTES, _LARGE_BYTES):
        message = torch.zeros(size, dtype=torch.uint8, device=device)

        def there_and_back(message: torch.Tensor = message) -> None:
            for sender in pair:
                if rank == sender:
                    dist.send(message, dst=other)
                else:
                    dist.recv(message, src=other)

        there_and_back()  # connections are made with the first message
        seconds.append(median(timed_call(there_and_back, device)[1] for _ in range(_PINGS)) / 2)
    small, large = seconds
    per_byte = max(large - small, 0.0) / (_LARGE_BYTES - _SMALL_BYTES)
    return max(small - per_byte * _SMALL_BYTES, 0.0), per_byte
