"""Find an order of passes under limits of memory: let no rank wait that has something to do.

List scheduling goes through a step as time passes.  A rank that is free takes what is ready: the gradient of an input
before a forward pass, since other ranks wait for it and memory becomes free.  Gradients of parameters, for which nobody
waits, fill the time in which nothing else is ready.  That is not always best, so the choices can be varied.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from random import Random

from lightning_hetero.balance.pipeline.orders.order import Action, Order
from lightning_hetero.balance.pipeline.simulation import PassTimes
from lightning_hetero.balance.pipeline.stages import Kind

__all__ = ["Choices", "Listing", "Task", "bound_s", "list_schedule"]


@dataclass(frozen=True)
class Task:
    """What has to be ordered.

    Attributes:
        ranks: Rank of each stage, the first stage first.
        times: Time of each stage and micro-batch.
        held: What a stage holds of each micro-batch, for example bytes, shape ``(num_stages,)``.
        caps: How much each rank may hold at a time, shape ``(world_size,)``.
        transfer_s: Seconds until the result of a pass has reached another rank.
    """

    ranks: tuple[int, ...]
    times: PassTimes
    held: tuple[float, ...]
    caps: tuple[float, ...]
    transfer_s: float = 0.0

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches."""
        return len(self.times.forward_s[0])

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages of a rank."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]

    def is_split(self, stage: int) -> bool:
        """Return whether a stage computes the two parts of a backward pass one by one.

        Nobody waits for the gradient of the first stage's input, so its backward pass is whole and can be put off.
        """
        return stage > 0 and any(self.times.weight_s[stage])

    def least_weight_s(self, stage: int) -> list[float]:
        """Return the time of the second part of backward passes if what splitting costs does not count."""
        times = self.times
        if not times.backward_s:
            return list(times.weight_s[stage])
        rows = zip(times.whole_s(stage), times.input_s[stage], times.weight_s[stage], strict=True)
        return [min(weight_s, max(whole_s - input_s, 0.0)) for whole_s, input_s, weight_s in rows]


@dataclass(frozen=True)
class Choices:
    """How list scheduling decides.

    Attributes:
        forward_first: Whether a forward pass goes before a backward pass that is ready at the same time.
        fills: The part of a pass that has to fit into a gap, so that a pass for which nobody waits fills the gap.
        noise: How often another choice is made, between 0 and 1; needs ``random``.
        random: Random numbers for ``noise``.
    """

    forward_first: bool = False
    fills: float = 0.0
    noise: float = 0.0
    random: Random | None = None


def list_schedule(task: Task, choices: Choices = Choices()) -> tuple[Order, float] | None:
    """Return an order and how long a step takes in it; None if a rank cannot hold a single micro-batch.

    Args:
        task: What has to be ordered.
        choices: How to decide.
    """
    return Listing(task).list(choices)


class Listing:
    """List scheduling of one task, in different ways.

    A search spends its time here, so passes are numbers: forward passes, then backward passes or those of inputs, then
    those of parameters; in each of the three by stage and then by micro-batch.

    Args:
        task: What has to be ordered.

    Attributes:
        fits: Whether each rank can hold one micro-batch in all of its stages.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._tables = _Tables.of(task)
        self.fits = all(room >= 0 for room in self._tables.room)

    def list(self, choices: Choices = Choices(), faster_than_s: float = inf) -> tuple[Order, float] | None:
        """Return an order and how long a step takes in it; None if it does not fit, or does not beat a time.

        Args:
            choices: How to decide.
            faster_than_s: Seconds per step that the order has to beat.
        """
        if not self.fits:
            return None
        step = _Step(self._tables, choices, faster_than_s)
        step_s = step.run()
        if step_s >= faster_than_s:
            return None
        return Order(self._task.ranks, self._task.micro_batches, self._tables.actions(step.passes)), step_s


@dataclass(frozen=True)
class _Tables:
    """A task in the form in which list scheduling needs it.

    Attributes:
        ranks: Rank of each stage.
        stages: Stages of each rank.
        split: Whether each stage computes the two parts of a backward pass one by one.
        count: Number of micro-batches.
        seconds: How long each pass takes.
        held: What each stage holds of a micro-batch.
        full: What each rank holds of a micro-batch in all of its stages.
        room: How much each rank may have promised when another micro-batch enters.
        work_s: Seconds of all passes of each rank.
        transfer_s: Seconds until the result of a pass has reached another rank.
    """

    ranks: tuple[int, ...]
    stages: list[list[int]]
    split: list[bool]
    count: int
    seconds: list[float]
    held: tuple[float, ...]
    full: list[float]
    room: list[float]
    work_s: list[float]
    transfer_s: float

    @classmethod
    def of(cls, task: Task) -> _Tables:
        """Return the tables of a task."""
        times, numbers = task.times, range(len(task.ranks))
        stages = [task.stages_of(rank) for rank in range(max(task.ranks) + 1)]
        split = [task.is_split(v) for v in numbers]
        whole = [times.whole_s(v) for v in numbers]
        backward = [times.input_s[v] if split[v] else whole[v] for v in numbers]
        weights = [task.least_weight_s(v) if split[v] else times.weight_s[v] for v in numbers]
        kinds = (times.forward_s, backward, weights)
        work_s = [sum(times.forward_s[v]) + sum(backward[v]) + (sum(weights[v]) if split[v] else 0.0) for v in numbers]
        full = [sum(task.held[v] for v in own) for own in stages]
        return cls(
            ranks=task.ranks,
            stages=stages,
            split=split,
            count=task.micro_batches,
            seconds=[seconds for kind in kinds for row in kind for seconds in row],
            held=task.held,
            full=full,
            # A micro-batch that enters the first stage gets memory in all stages, so it can always go on.
            room=[cap * (1 + 1e-9) - needed for cap, needed in zip(task.caps, full, strict=True)],
            work_s=[sum(work_s[v] for v in own) for own in stages],
            transfer_s=task.transfer_s,
        )

    def actions(self, passes: list[list[int]]) -> tuple[tuple[Action, ...], ...]:
        """Return the passes of each rank that have these numbers."""
        size = len(self.ranks) * self.count
        names: list[tuple[Kind, Kind, Kind]] = [
            ("forward", "input" if split else "backward", "weight") for split in self.split
        ]
        places = [[(number // size, *divmod(number % size, self.count)) for number in own] for own in passes]
        return tuple(tuple(Action(names[stage][kind], stage, i) for kind, stage, i in own) for own in places)


class _Step:
    """The course of one step.

    Args:
        tables: What has to be ordered.
        choices: How to decide.
        faster_than_s: Seconds per step that the order has to beat.

    Attributes:
        passes: The passes of each rank so far.
    """

    def __init__(self, tables: _Tables, choices: Choices, faster_than_s: float) -> None:
        self._tables, self._choices = tables, choices
        last, count, world_size = len(tables.ranks) - 1, tables.count, len(tables.stages)
        self._size = size = (last + 1) * count
        # when the input and the gradient of a stage arrive, by stage and micro-batch; infinity while that is unknown
        self._inputs_s = [0.0] * count + [inf] * (last * count)
        self._gradients_s = [inf] * size
        # of passes that are ready at the same time, the one with the lowest number goes first
        self._of_forward = [(0 if choices.forward_first else 2) * size + last - v for v in range(last + 1)]
        self._of_backward = [(1 if v else 3) * size + v for v in range(last + 1)]
        self._forward, self._backward = [0] * (last + 1), [0] * (last + 1)  # passes that each stage has computed
        self._promised, self._free_s = [0.0] * world_size, [0.0] * world_size
        self._open: list[deque[int]] = [deque() for _ in range(world_size)]  # gradients of parameters
        self._slack_s = [faster_than_s - work_s for work_s in tables.work_s]
        self._next_s, self._next = [inf] * world_size, [-1] * world_size
        self.passes: list[list[int]] = [[] for _ in range(world_size)]

    def run(self) -> float:
        """Return the seconds of the step; infinity as soon as a rank has waited for too long."""
        tables, next_s = self._tables, self._next_s
        for rank in range(len(tables.stages)):
            self._choose(rank)
        for _ in range(tables.count * sum(3 if split else 2 for split in tables.split)):
            start_s = min(next_s)
            rank = next_s.index(start_s)
            if start_s > self._free_s[rank]:
                self._slack_s[rank] -= start_s - self._free_s[rank]
                if self._slack_s[rank] <= 0:
                    return inf
            other = self._compute(rank, self._next[rank], start_s)
            self._choose(rank)
            if other >= 0:
                self._choose(other)
        return max(self._free_s)

    def _choose(self, rank: int) -> None:
        """Say when the next pass of a rank begins, and which it is; infinity while nothing becomes ready."""
        tables, now_s, size = self._tables, self._free_s[rank], self._size
        candidates = []
        filler = self._open[rank][0] if self._open[rank] else -1  # nobody waits for it
        first = tables.stages[rank][0]
        for stage in tables.stages[rank]:
            i, j = self._forward[stage], self._backward[stage]
            place = stage * tables.count
            if i < tables.count and (stage != first or self._promised[rank] <= tables.room[rank]):
                ready_s = self._inputs_s[place + i]
                if ready_s < inf:
                    candidates.append((max(ready_s, now_s), self._of_forward[stage], place + i))
            if j < i and (ready_s := self._gradients_s[place + j]) < inf:
                if stage or ready_s > now_s:
                    candidates.append((max(ready_s, now_s), self._of_backward[stage], size + place + j))
                else:
                    filler = size + place + j  # neither does anybody for the backward pass of the first stage
        start_s, _, number = min(candidates) if candidates else (inf, 0, -1)
        choices = self._choices
        if choices.random is not None and candidates:
            if filler >= 0 and choices.random.random() < choices.noise:
                start_s, number, filler = now_s, filler, -1
            elif len(candidates) > 1 and choices.random.random() < choices.noise:
                start_s, _, number = choices.random.choice(sorted(candidates))
                filler = -1
        if filler >= 0:
            gap_s = start_s - now_s
            if gap_s > 1e-12 and gap_s >= choices.fills * tables.seconds[filler] - 1e-9:
                start_s, number = now_s, filler
        self._next_s[rank], self._next[rank] = start_s, number

    def _compute(self, rank: int, number: int, start_s: float) -> int:
        """Compute a pass of a rank, and return the rank that gets its result; -1 if none does."""
        assert number >= 0, "one of the earliest micro-batches can always go on"
        tables = self._tables
        self._free_s[rank] = end_s = start_s + tables.seconds[number]
        self.passes[rank].append(number)
        kind, place = divmod(number, self._size)
        stage = place // tables.count
        if kind == 0:
            self._forward[stage] += 1
            if stage == tables.stages[rank][0]:
                self._promised[rank] += tables.full[rank]
            if stage == len(tables.ranks) - 1:
                self._gradients_s[place] = end_s
                return -1
            self._inputs_s[place + tables.count] = end_s + tables.transfer_s
            return tables.ranks[stage + 1]
        if kind == 1:
            self._backward[stage] += 1
            if tables.split[stage]:
                self._open[rank].append(self._size + number)
            else:
                self._promised[rank] -= tables.held[stage]
            if stage:
                self._gradients_s[place - tables.count] = end_s + tables.transfer_s
                return tables.ranks[stage - 1]
            return -1
        self._open[rank].popleft()
        self._promised[rank] -= tables.held[stage]
        return -1


def bound_s(task: Task) -> float:
    """Return a time that no order can beat: what a rank has to wait for before its passes, and after them.

    Args:
        task: What has to be ordered.
    """
    times, num_stages = task.times, len(task.ranks)
    apart_s = [task.transfer_s if a != b else 0.0 for a, b in pairwise(task.ranks)] + [0.0]
    # of a backward pass, what others wait for and all of it; whether it is split is open
    firsts_s: list[list[float]] = []
    alls_s: list[list[float]] = []
    for stage in range(num_stages):
        whole_s, first_s = times.whole_s(stage), list(times.input_s[stage])
        if task.is_split(stage):
            rest_s = task.least_weight_s(stage)
            firsts_s.append([min(a, b) for a, b in zip(whole_s, first_s, strict=True)])
            alls_s.append([min(a, b + c) for a, b, c in zip(whole_s, first_s, rest_s, strict=True)])
        else:
            firsts_s.append(whole_s)
            alls_s.append(whole_s)
    head_s, heads_s = 0.0, []  # before the first pass of each stage
    after_s, tails_s = [0.0] * task.micro_batches, []  # of each micro-batch after its last pass but one in a stage
    for stage in range(num_stages):
        heads_s.append(head_s)
        tails_s.append(min(after_s))
        head_s += times.forward_s[stage][0] + apart_s[stage]
        after_s = [a + b + apart_s[stage] for a, b in zip(after_s, firsts_s[stage], strict=True)]
    found: list[float] = []
    for rank in range(max(task.ranks) + 1):
        stages = task.stages_of(rank)
        head_s = heads_s[stages[0]] + sum(sum(times.forward_s[v]) for v in stages)
        found.append(head_s + sum(sum(alls_s[v]) for v in stages))
        found.append(head_s + sum(sum(firsts_s[v]) for v in stages) + tails_s[stages[0]])
    forward_s = [sum(column) for column in zip(*times.forward_s, strict=True)]
    found += [sum(apart_s) + a + b for a, b in zip(forward_s, after_s, strict=True)]  # one micro-batch alone
    return max(found)
