"""List ways to group ranks into replicas: all of them where they are few, otherwise good ones.

Of many ranks, groups of equal numbers are the start: neighbours by speed, by memory or by node, or as mixed as can be.
Then ranks change groups, and change places with ranks of other groups, as long as an estimate of the speed of all
groups together grows (``estimate``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, permutations
from random import Random
from typing import Any

from lightning_hetero.balance.pipeline.replicas.estimate import Estimate
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem

__all__ = ["Climb", "Groups", "all_groupings", "good_groupings"]

Groups = tuple[tuple[int, ...], ...]

_MAX_GROUPINGS = 1_000
_SMALL = 24
_STEP = 1.15  # larger numbers of groups that are tried differ by this factor at least
_CLIMBED = 10  # groupings from which the search begins
_CLIMBED_RANKS = 480  # or as many as have so many ranks together
_CLIMBED_OF_NUMBER = 2  # of these, with the same number of groups; of few ranks, twice as many
_EFFORT = 1_500  # exchanges of ranks that are tried from each of them
_LEAST = 1e-9  # part of the speed that an exchange must gain


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


def good_groupings(problem: ReplicaProblem, estimate: Estimate, counts: range) -> list[Groups]:
    """Return good groupings for many numbers of groups, the most promising first.

    Args:
        problem: The ranks and the layers.
        estimate: What estimates the speed of groups.
        counts: Numbers of groups that are allowed.
    """
    starts = [
        (estimate.step_s(groups), groups)
        for count in _numbers(counts, problem.world_size)
        for groups in _equal(problem, count)
    ]
    found = {estimate.key(groups): (step_s, groups) for step_s, groups in sorted(starts, reverse=True)}
    most = _CLIMBED_OF_NUMBER * (1 + (problem.world_size * _CLIMBED < _CLIMBED_RANKS))
    random, climbed = Random(0), Counter[int]()
    for _, groups in sorted(found.values()):
        if climbed.total() < max(_CLIMBED, _CLIMBED_RANKS // problem.world_size) and climbed[len(groups)] < most:
            climbed[len(groups)] += 1
            for same_node in (False, True) if problem.nodes else (False,):
                climb = Climb(problem, estimate, counts, random, same_node=same_node)
                better = climb.best(groups)
                found.setdefault(estimate.key(better), (estimate.step_s(better), better))
    return [groups for _, groups in sorted(found.values())]


def _numbers(counts: range, world_size: int) -> list[int]:
    """Return small numbers, those that divide the ranks, and others that are far enough apart to matter."""
    found: list[int] = []
    for count in counts:
        if count <= _SMALL or world_size % count == 0 or not found or count >= found[-1] * _STEP:
            found.append(count)
    return found


def _equal(problem: ReplicaProblem, count: int) -> Iterator[Groups]:
    """Yield groups whose numbers of ranks differ by one at most."""
    work = [sum(row) for row in problem.costs.total_s]
    memory = [0.0] * problem.world_size if problem.memory is None else problem.memory.budgets_bytes
    node = [problem.node_of(rank) for rank in range(problem.world_size)]
    size, larger = divmod(problem.world_size, count)
    firsts = [i * size + min(i, larger) for i in range(count + 1)]
    for first, second in ((work, node), (node, work), (memory, node), (node, memory)):
        order = sorted(range(problem.world_size), key=list(zip(first, second, strict=True)).__getitem__)
        yield tuple(tuple(order[a:b]) for a, b in pairwise(firsts))
        yield tuple(tuple(order[i::count]) for i in range(count))


class Climb:
    """Lets ranks change groups, change places, or leave for a group of their own, as long as all become faster.

    Args:
        problem: The ranks and the layers.
        estimate: What estimates the speed of a group.
        counts: Numbers of groups that are allowed.
        random: Order in which groups are tried.
        same_node: Whether a rank changes only to a group with another rank of its node, so that the average of a layer
            stays within the nodes that it is in.
    """

    def __init__(
        self, problem: ReplicaProblem, estimate: Estimate, counts: range, random: Random, *, same_node: bool
    ) -> None:
        self._problem, self._estimate, self._counts = problem, estimate, counts
        self._random, self._same_node = random, same_node
        self._left = _EFFORT

    def best(self, groups: Groups) -> Groups:
        """Return groups to which no exchange adds speed, or those after which the effort is spent."""
        now = [list(group) for group in groups]
        rates = [self._estimate.rate(group) for group in groups]
        while self._left > 0:
            pairs = list(permutations(range(len(now) + 1), 2))  # the last one is a new group
            self._random.shuffle(pairs)
            if sum(self._exchange(now, rates, *pair) for pair in pairs) == 0:
                break
        return tuple(sorted(tuple(sorted(group)) for group in now))

    def neighbours(self, groups: Groups) -> Iterator[Groups]:
        """Yield the groupings to which one exchange leads, in a random order."""
        pairs = list(permutations(range(len(groups)), 2))
        self._random.shuffle(pairs)
        for giver, taker in pairs:
            for one, other in self.exchanges(groups[giver], groups[taker], len(groups)):
                less = (*(rank for rank in groups[giver] if rank != one), *other)
                more = (*(rank for rank in groups[taker] if rank not in other), one)
                rest = (group for i, group in enumerate(groups) if i not in (giver, taker))
                yield (*rest, more, *([less] if less else []))

    def _exchange(self, groups: list[list[int]], rates: list[float], giver: int, taker: int) -> bool:
        """Make an exchange between two groups that adds speed; return whether there was one."""
        if giver >= len(groups) or taker > len(groups) or self._left <= 0:
            return False
        taken, before = ([], 0.0) if taker == len(groups) else (groups[taker], rates[taker])
        if not taken and len(groups) + 1 not in self._counts:
            return False
        before += rates[giver]
        for one, other in self.exchanges(groups[giver], taken, len(groups)):
            self._left -= 1
            less = [*groups[giver], *other]
            less.remove(one)
            more = [rank for rank in taken if rank not in other] + [one]
            found = (self._estimate.rate(less) if less else 0.0), self._estimate.rate(more)
            if sum(found) > before + _LEAST * abs(before):
                groups[giver : giver + 1], rates[giver : giver + 1] = [less], [found[0]]
                groups[taker : taker + 1], rates[taker : taker + 1] = [more], [found[1]]
                if not less:
                    del groups[giver], rates[giver]
                return True
        return False

    def exchanges(
        self, giver: Sequence[int], taker: Sequence[int], count: int
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield a rank that one group gives to another, and what it gets for it: nothing, or a rank not alike."""
        label, node_of = self._estimate.label, self._problem.node_of
        gives, gets = ({label(rank): rank for rank in group} for group in (giver, taker))
        nodes = {node_of(rank) for rank in taker}
        leaves = len(giver) > 1 or (count - 1 in self._counts and bool(taker))
        for kind, rank in gives.items():
            near = not self._same_node or not taker or node_of(rank) in nodes
            if leaves and near and len(taker) < self._problem.num_layers:
                yield rank, ()
            for other_kind, other in gets.items():
                if other_kind > kind and (not self._same_node or node_of(other) == node_of(rank)):
                    yield rank, (other,)
