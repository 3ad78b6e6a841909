"""Change the stages and samples of replicas so that averages of gradients end earlier.

The stages that end a replica's passes first need not end the averages first: with borders at the same layers, or the
layers with large gradients in stages that end early, more of them overlap with passes. So each replica in turn takes
the best of its fast stages, all take borders that the longest one has, and samples move between replicas, as long as
the step becomes shorter. Few replicas then change all at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from lightning_hetero.balance.pipeline.replicas.group_solver import GroupSolver
from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.reduction import reduced_s
from lightning_hetero.balance.pipeline.stages import StagePlan

__all__ = ["improved_plan"]

_ALTERNATIVES = 60  # stages of one replica that are tried
_TO_ALIGN = 1_000  # stages of one replica among which those with some borders are looked for
_FEW = 3  # replicas of which all may change at once
_JOINT = 1_000  # states in which they do
_EFFORT = 4_000  # rings that are timed for one plan


@dataclass(frozen=True)
class _State:
    """Replicas, and when the last pass of each of their stages ends."""

    replicas: tuple[Replica, ...]
    ends_s: tuple[tuple[float, ...], ...]

    def changed(self, number: int, replica: Replica, ends_s: tuple[float, ...]) -> _State:
        return _State(
            (*self.replicas[:number], replica, *self.replicas[number + 1 :]),
            (*self.ends_s[:number], ends_s, *self.ends_s[number + 1 :]),
        )


def improved_plan(
    problem: ReplicaProblem, groups: GroupSolver, plan: ReplicaPlan, samples: Sequence[int]
) -> ReplicaPlan:
    """Return a plan of the same groups whose step is shorter, or the same plan.

    Args:
        problem: The layers, the ranks and the links.
        groups: What times the stages.
        plan: Plan to start from.
        samples: Samples of each replica.
    """
    return _Improvement(problem, groups, plan, samples).best()


class _Improvement:
    def __init__(self, problem: ReplicaProblem, groups: GroupSolver, plan: ReplicaPlan, samples: Sequence[int]) -> None:
        self._problem, self._groups = problem, groups
        self._left = _EFFORT
        replicas = tuple(Replica(r.ranks, r.stages, float(n)) for r, n in zip(plan.replicas, samples, strict=True))
        self._state = _State(replicas, tuple(self._ends_s(replica) for replica in replicas))
        self._step_s = self._timed(self._state)

    def best(self) -> ReplicaPlan:
        improved = True
        while improved and self._left > 0:
            improved = False
            for number in range(len(self._state.replicas)):
                improved |= self._take(self._restaged(number))
            improved |= self._take(self._aligned())
            improved |= self._take(self._moved())
            if not improved and len(self._state.replicas) <= _FEW:
                improved |= self._take(self._joint())
        return ReplicaPlan(self._state.replicas)

    def _take(self, states: Iterator[_State]) -> bool:
        """Take the best of some states, if it is better than the current one."""
        best: _State | None = None
        for state in states:
            if max(map(max, state.ends_s)) < self._step_s and (step_s := self._timed(state)) < self._step_s * (
                1 - 1e-9
            ):
                best, self._step_s = state, step_s
            if self._left <= 0:
                break
        if best is None:
            return False
        self._state = best
        return True

    def _restaged(self, number: int) -> Iterator[_State]:
        share = self._state.replicas[number].share
        for ranks, stages, ends_s in self._alternatives(number, _ALTERNATIVES):
            yield self._state.changed(number, Replica(ranks, stages, share), ends_s)

    def _aligned(self) -> Iterator[_State]:
        """Yield states in which all borders are borders of the replica with the most stages."""
        each = [self._alternatives(number, _TO_ALIGN) for number in range(len(self._state.replicas))]
        longest = max(self._state.replicas, key=lambda replica: replica.stages.num_stages)
        candidates = each[self._state.replicas.index(longest)]
        for borders in list(dict.fromkeys(stages.ends for _, stages, _ in candidates))[:_ALTERNATIVES]:
            found = [next((one for one in stages if {*one[1].ends} <= {*borders}), None) for stages in each]
            state = self._state
            for number, one in enumerate(found):
                if one is not None:
                    ranks, stages, ends_s = one
                    state = state.changed(number, Replica(ranks, stages, state.replicas[number].share), ends_s)
            if None not in found:
                yield state

    def _joint(self) -> Iterator[_State]:
        """Yield states of few replicas in which all of them, and the samples of two, change at once."""
        count = len(self._state.replicas)
        most = int(_JOINT ** (1 / count))
        for giver, taker in ((0, 0), *permutations(range(count), 2)):
            replicas = list(self._state.replicas)
            if giver != taker:
                one, other = replicas[giver], replicas[taker]
                if one.share <= 1:
                    continue
                replicas[giver] = Replica(one.ranks, one.stages, one.share - 1)
                replicas[taker] = Replica(other.ranks, other.stages, other.share + 1)
            each = [self._fast_stages(replica, most) for replica in replicas]
            for chosen in product(*each):
                changed = [
                    Replica(r, stages, replica.share) for (r, stages, _), replica in zip(chosen, replicas, strict=True)
                ]
                yield _State(tuple(changed), tuple(ends_s for *_, ends_s in chosen))

    def _alternatives(self, number: int, most: int) -> list[tuple[tuple[int, ...], StagePlan, tuple[float, ...]]]:
        """Return fast stages of a replica of the current state."""
        return self._fast_stages(self._state.replicas[number], most)

    def _fast_stages(self, replica: Replica, most: int) -> list[tuple[tuple[int, ...], StagePlan, tuple[float, ...]]]:
        """Return fast stages of a replica, with its ranks, and when the last pass of each stage ends."""
        arguments = (replica.ranks, replica.stages, round(replica.share), self._step_s, most)
        return [(replica.ranks, *found) for found in self._groups.alternatives(*arguments)]

    def _moved(self) -> Iterator[_State]:
        state = self._state
        latest = sorted(range(len(state.replicas)), key=lambda number: -max(state.ends_s[number]))
        for giver, taker in permutations(latest, 2):
            one, other = state.replicas[giver], state.replicas[taker]
            for count in {1, round(one.share) // 8, round(one.share) // 2} - {0}:
                if count < one.share and self._groups.fits(other.ranks, other.stages, round(other.share) + count):
                    less = Replica(one.ranks, one.stages, one.share - count)
                    more = Replica(other.ranks, other.stages, other.share + count)
                    changed = state.changed(giver, less, self._ends_s(less))
                    yield changed.changed(taker, more, self._ends_s(more))

    def _ends_s(self, replica: Replica) -> tuple[float, ...]:
        return self._groups.ends_s(replica.ranks, replica.stages, round(replica.share))

    def _timed(self, state: _State) -> float:
        self._left -= len(state.replicas)
        return reduced_s(self._problem, state.replicas, state.ends_s)
