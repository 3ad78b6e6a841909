"""Find an order of passes under limits of memory: let no rank wait that has something to do.

List scheduling goes through a step as time passes.  A rank that is free takes what is ready: the gradient of an input
before a forward pass, since other ranks wait for it and memory becomes free.  Gradients of parameters, for which nobody
waits, fill the time in which nothing else is ready.  That is not always best, so the choices can be varied.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from random import Random

from lightning_hetero.balance.pipeline.orders.order import Action, Order
from lightning_hetero.balance.pipeline.simulation import PassTimes

__all__ = ["Choices", "Task", "bound_s", "list_schedule"]


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
    world_size = max(task.ranks) + 1
    ranks = [_Rank(task, rank, choices) for rank in range(world_size)]
    if any(rank.full > cap * (1 + 1e-9) for rank, cap in zip(ranks, task.caps, strict=True)):
        return None
    known = _Known(task)
    left = sum(rank.left for rank in ranks)
    nexts = [rank.choose(known) for rank in ranks]
    while left:
        number = min(range(world_size), key=lambda r: nexts[r][0])
        start_s, action = nexts[number]
        assert action is not None, "one of the earliest micro-batches can always go on"
        ranks[number].run(action, start_s, known)
        left -= 1
        nexts[number] = ranks[number].choose(known)
        neighbour = action.stage + (1 if action.kind == "forward" else -1)
        if action.kind != "weight" and 0 <= neighbour < len(task.ranks) and task.ranks[neighbour] != number:
            other = task.ranks[neighbour]
            nexts[other] = ranks[other].choose(known)
    order = Order(task.ranks, task.micro_batches, tuple(tuple(rank.actions) for rank in ranks))
    return order, max(rank.free_s for rank in ranks)


class _Known:
    """When results exist; infinity while that is unknown.

    Args:
        task: What has to be ordered.
    """

    def __init__(self, task: Task) -> None:
        self.forward_s = [[inf] * task.micro_batches for _ in task.ranks]
        self.backward_s = [[inf] * task.micro_batches for _ in task.ranks]


class _Rank:
    """One rank in the course of a step.

    Args:
        task: What has to be ordered.
        rank: The rank.
        choices: How to decide.
    """

    def __init__(self, task: Task, rank: int, choices: Choices) -> None:
        self._task, self._rank, self._choices = task, rank, choices
        self._stages = task.stages_of(rank)
        self._split = [task.is_split(stage) for stage in range(len(task.ranks))]
        self.full = sum(task.held[stage] for stage in self._stages)
        self._most = task.caps[rank] * (1 + 1e-9)
        # A micro-batch that enters the first stage gets memory in all stages, so it can always go on.
        self._promised = 0.0
        self._forward = [0] * len(task.ranks)
        self._backward = [0] * len(task.ranks)
        self._open: list[tuple[int, int]] = []  # stages and micro-batches whose parameters wait for their gradients
        self.left = task.micro_batches * sum(3 if self._split[stage] else 2 for stage in self._stages)
        self.free_s = 0.0
        self.actions: list[Action] = []

    def choose(self, known: _Known) -> tuple[float, Action | None]:
        """Return when the next pass begins, and which it is; None while nothing is known to become ready."""
        candidates = [(start_s, action) for start_s, _, action in sorted(self._ready(known))]
        filler = self._filler(known)
        choices = self._choices
        if choices.random is not None and candidates:
            if filler is not None and choices.random.random() < choices.noise:
                return self.free_s, filler
            if len(candidates) > 1 and choices.random.random() < choices.noise:
                return choices.random.choice(candidates)
        if filler is None:
            return candidates[0] if candidates else (inf, None)
        gap_s = candidates[0][0] - self.free_s if candidates else inf
        is_filled = gap_s > 1e-12 and gap_s >= choices.fills * self._task.times.seconds(filler) - 1e-9
        return (self.free_s, filler) if is_filled else candidates[0]

    def _ready(self, known: _Known) -> list[tuple[float, tuple[int, int], Action]]:
        """Return passes for which others wait, when they can begin, and what decides between those of one time."""
        task, found = self._task, []
        for stage in self._stages:
            i = self._forward[stage]
            if i < task.micro_batches and self._has_room(stage):
                ready_s = self._arrival(known.forward_s, stage - 1, i) if stage else 0.0
                if ready_s < inf:
                    key = (0 if self._choices.forward_first else 2, -stage)
                    found.append((max(ready_s, self.free_s), key, Action("forward", stage, i)))
            i = self._backward[stage]
            if i < self._forward[stage]:
                ready_s = self._gradient_arrival(known, stage, i)
                # for the backward pass of the first stage nobody waits, so one that is ready only fills gaps
                if ready_s < inf and (stage or ready_s > self.free_s):
                    kind = Action("input" if self._split[stage] else "backward", stage, i)
                    found.append((max(ready_s, self.free_s), (1 if stage else 3, stage), kind))
        return found

    def _has_room(self, stage: int) -> bool:
        return stage != self._stages[0] or self._promised + self.full <= self._most

    def _filler(self, known: _Known) -> Action | None:
        """Return a pass that can begin at once and for which nobody waits."""
        i = self._backward[0]
        if self._stages[0] == 0 and i < self._forward[0] and self._gradient_arrival(known, 0, i) <= self.free_s:
            return Action("backward", 0, i)
        return Action("weight", *self._open[0]) if self._open else None

    def _arrival(self, ends_s: list[list[float]], stage: int, i: int) -> float:
        apart = self._task.ranks[stage] != self._rank
        return ends_s[stage][i] + (self._task.transfer_s if apart else 0.0)

    def _gradient_arrival(self, known: _Known, stage: int, i: int) -> float:
        if stage == len(self._task.ranks) - 1:
            return known.forward_s[stage][i]
        return self._arrival(known.backward_s, stage + 1, i)

    def run(self, action: Action, start_s: float, known: _Known) -> None:
        """Compute a pass."""
        kind, stage, i = action
        end_s = start_s + self._task.times.seconds(action)
        if kind == "forward":
            self._forward[stage] += 1
            known.forward_s[stage][i] = end_s
            if stage == self._stages[0]:
                self._promised += self.full
        elif kind == "weight":
            self._open.pop(0)
        else:
            self._backward[stage] += 1
            known.backward_s[stage][i] = end_s
            if kind == "input":
                self._open.append((stage, i))
        if kind in ("backward", "weight"):
            self._promised -= self._task.held[stage]
        self.actions.append(action)
        self.free_s = end_s


def bound_s(task: Task) -> float:
    """Return a time that no order can beat: what a rank has to wait for before its passes, and after them.

    Args:
        task: What has to be ordered.
    """
    times, last = task.times, task.micro_batches - 1
    found = [0.0]
    for rank in range(max(task.ranks) + 1):
        stages = task.stages_of(rank)
        head_s = sum(times.forward_s[u][0] + _apart_s(task, u) for u in range(stages[0]))
        tail_s = (
            min(
                sum(times.input_s[u][i] + _apart_s(task, u) for u in range(stages[0])) + times.weight_s[0][i]
                for i in range(last + 1)
            )
            if stages[0]
            else 0.0
        )
        passes_s = sum(sum(times.forward_s[v]) + sum(times.input_s[v]) for v in stages)
        weights_s = [sum(times.weight_s[v]) for v in stages]
        can_wait_s = sum(w for v, w in zip(stages, weights_s, strict=True) if task.is_split(v))
        found += [head_s + passes_s + sum(weights_s), head_s + passes_s + sum(weights_s) - can_wait_s + tail_s]
    apart_s = 2 * sum(_apart_s(task, u) for u in range(len(task.ranks) - 1))
    for i in range(last + 1):
        both_s = sum(times.forward_s[v][i] + times.input_s[v][i] for v in range(len(task.ranks)))
        found.append(both_s + times.weight_s[0][i] + apart_s)
    return max(found)


def _apart_s(task: Task, stage: int) -> float:
    """Return the time of a transfer between a stage and the next one."""
    return task.transfer_s if task.ranks[stage] != task.ranks[stage + 1] else 0.0
