"""List ways to group ranks into replicas: all of them where they are few, otherwise some to begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem

__all__ = ["Groups", "all_groupings", "plain_groupings"]

Groups = tuple[tuple[int, ...], ...]

_MAX_GROUPINGS = 4_000


def all_groupings(
    ranks: Sequence[int],
    label: Callable[[int], Any],
    counts: range,
    longest: int,
) -> list[Groups] | None:
    """Return every way to group ranks, without those that differ only by ranks with the same label.

    Args:
        ranks: The ranks to group.
        label: Function that returns the same for ranks that are alike.
        counts: Numbers of groups that are allowed.
        longest: Largest number of ranks in a group.

    Returns:
        The groupings; None if there are too many.
    """
    found: list[Groups] = [()]
    for done, rank in enumerate(ranks, start=1):
        after: dict[tuple[Any, ...], Groups] = {}
        for groups in found:
            for grown in _with(groups, rank, longest):
                if len(grown) < counts.stop and len(grown) + len(ranks) - done >= counts.start:
                    key = tuple(sorted(tuple(sorted(map(label, group))) for group in grown))
                    after.setdefault(key, grown)
        found = list(after.values())
        if len(found) > _MAX_GROUPINGS:
            return None
    return found


def _with(groups: Groups, rank: int, longest: int) -> Iterator[Groups]:
    for i, group in enumerate(groups):
        if len(group) < longest:
            yield (*groups[:i], (*group, rank), *groups[i + 1 :])
    yield (*groups, (rank,))


def plain_groupings(problem: ReplicaProblem, counts: range) -> Iterator[Groups]:
    """Yield groups of equal numbers of ranks: alike in each group, or of each kind in each group."""
    work = [sum(row) for row in problem.costs.total_s]
    ranks = range(problem.world_size)
    by_speed = sorted(ranks, key=lambda rank: (work[rank], problem.node_of(rank)))
    by_node = sorted(ranks, key=lambda rank: (problem.node_of(rank), work[rank]))
    for count in counts:
        if -(-problem.world_size // count) > problem.num_layers:
            continue
        for order in (by_speed, by_node):
            size, larger = divmod(problem.world_size, count)
            firsts = [i * size + min(i, larger) for i in range(count + 1)]
            yield tuple(tuple(order[a:b]) for a, b in pairwise(firsts))
            yield tuple(tuple(order[i::count]) for i in range(count))
