"""The order in which each rank of a pipeline computes its passes.

A rank may hold several stages.  Each stage has a forward pass for each micro-batch, and either one backward pass or two
parts of it: ``input`` computes the gradient of the stage's input, for which the stage before waits, and ``weight`` the
gradients of its parameters, for which nobody waits (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024).

- ``gpipe``: all forward passes, then all backward passes (Huang et al., "GPipe", NeurIPS 2019).
- ``1f1b``: as many forward passes as there are stages from this one to the last, then one backward pass per forward
  pass, so that a stage holds fewer activations (Narayanan et al., "PipeDream", SOSP 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lightning_hetero.balance.pipeline.stages import Kind, Schedule

__all__ = ["Action", "Message", "Order", "forward_order", "known_order", "micro_batches_in_flight"]


class Action(NamedTuple):
    """One pass of one micro-batch through one stage.

    Attributes:
        kind: What is computed: "forward", "backward", or the parts of the latter, "input" and "weight".
        stage: Index of the stage.
        micro_batch: Index of the micro-batch.
    """

    kind: Kind
    stage: int
    micro_batch: int


class Message(NamedTuple):
    """What one rank sends to another.

    Attributes:
        is_gradient: Whether it is a gradient, for the stage before; otherwise it is the output of a stage.
        stage: The stage that receives it.
        micro_batch: Index of the micro-batch.
    """

    is_gradient: bool
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Order:
    """The passes of each rank in the order in which it computes them.

    Attributes:
        ranks: Rank of each stage, the first stage first.
        micro_batches: Number of micro-batches.
        actions: Passes of each rank, rank 0 first.
    """

    ranks: tuple[int, ...]
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.ranks)

    def first(self, count: int) -> Order:
        """Return the order of the first ``count`` micro-batches, for a step with fewer; it ends as this one does."""
        if count >= self.micro_batches:
            return self
        kept = (tuple(a for a in actions if a.micro_batch < count) for actions in self.actions)
        return Order(self.ranks, count, tuple(kept))

    def message_after(self, action: Action) -> tuple[int, Message] | None:
        """Return what a pass sends to another rank, and to which; None if its result stays on its rank or is final."""
        if action.kind == "weight":
            return None
        is_gradient = action.kind != "forward"
        stage = action.stage + (-1 if is_gradient else 1)
        if not 0 <= stage < self.num_stages or self.ranks[stage] == self.ranks[action.stage]:
            return None
        return self.ranks[stage], Message(is_gradient, stage, action.micro_batch)

    def messages(self, source: int, target: int) -> list[Message]:
        """Return what ``source`` sends to ``target``, in the order in which it is sent."""
        found = (self.message_after(action) for action in self.actions[source])
        return [message for sent in found if sent is not None and sent[0] == target for message in sent[1:]]


def known_order(ranks: Sequence[int], micro_batches: int, schedule: Schedule) -> Order:
    """Return the order of "1f1b" or "gpipe", in which each rank has one stage.

    Example:
        >>> [(a.kind, a.micro_batch) for a in known_order([0, 1], 3, "1f1b").actions[1]][:3]
        [('forward', 0), ('backward', 0), ('forward', 1)]
    """
    return _known_order(tuple(ranks), micro_batches, schedule)


@lru_cache(maxsize=4)
def _known_order(ranks: tuple[int, ...], micro_batches: int, schedule: Schedule) -> Order:
    actions: list[tuple[Action, ...]] = [()] * len(ranks)
    for stage, rank in enumerate(ranks):
        ahead = micro_batches_in_flight(stage, len(ranks), micro_batches, schedule)
        forward = [Action("forward", stage, i) for i in range(micro_batches)]
        own = forward[:ahead]
        for i in range(micro_batches):
            own.append(Action("backward", stage, i))
            own += forward[ahead + i : ahead + i + 1]
        actions[rank] = tuple(own)
    return Order(ranks, micro_batches, tuple(actions))


def forward_order(ranks: Sequence[int], micro_batches: int) -> Order:
    """Return an order of forward passes alone, for evaluation.

    A rank with several stages begins with as many micro-batches of the first one as there are stages up to the next, so
    that no rank waits for one micro-batch to go through all stages.
    """
    passes = [Action("forward", stage, i) for stage in range(len(ranks)) for i in range(micro_batches)]
    passes.sort(key=lambda a: (a.stage + a.micro_batch, -a.stage))
    world_size = max(ranks) + 1
    return Order(
        tuple(ranks), micro_batches, tuple(tuple(a for a in passes if ranks[a.stage] == r) for r in range(world_size))
    )


def micro_batches_in_flight(stage: int, num_stages: int, micro_batches: int, schedule: Schedule) -> int:
    """Return the largest number of micro-batches whose activations a stage holds at a time."""
    return micro_batches if schedule == "gpipe" else min(micro_batches, num_stages - stage)
