"""Prove that an order of passes ends, and how much each rank holds in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lightning_hetero.balance.pipeline.orders.order import Action, Order
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["most_held", "most_micro_batches", "verify_order"]


def verify_order(order: Order, held: Sequence[float] = (), caps: Sequence[float] = ()) -> None:
    """Verify that every rank has all passes of its stages, that none waits for ever, and that none holds too much.

    A rank waits for a message until it has been sent, and never for one of its own to arrive. So an order ends if and
    only if no pass depends on itself, through the passes before it on its rank and those whose results it needs.

    Args:
        order: The order.
        held: What a stage holds of each micro-batch from its forward pass to the end of its backward pass, for example
            bytes, shape ``(num_stages,)``; empty to leave that out.
        caps: How much each rank may hold at a time, shape ``(world_size,)``.

    Raises:
        ConfigurationError: The order breaks a rule.
    """
    for rank, actions in enumerate(order.actions):
        _verify_passes(order, rank, actions)
    stuck = _stuck(order)
    if stuck is not None:
        rank, action = stuck
        raise ConfigurationError(
            f"Every pass of a pipeline must have its turn, but rank {rank} would wait for ever before {_named(action)}."
        )
    if held:
        for rank, (most, cap) in enumerate(zip(most_held(order, held), caps, strict=True)):
            if most > cap * (1 + 1e-9):
                raise ConfigurationError(f"Rank {rank} must hold at most {cap:g} in an order of passes, got {most:g}.")


def most_held(order: Order, held: Sequence[float]) -> tuple[float, ...]:
    """Return the most that each rank holds at a time.

    Args:
        order: An order that :func:`verify_order` accepts.
        held: What a stage holds of each micro-batch, shape ``(num_stages,)``.
    """
    found = []
    for actions in order.actions:
        now = most = 0.0
        for action in actions:
            if action.kind == "forward":
                now += held[action.stage]
                most = max(most, now)
            elif action.kind != "input":
                now -= held[action.stage]
        found.append(most)
    return tuple(found)


def most_micro_batches(order: Order) -> int:
    """Return the largest number of micro-batches of which a rank holds something at a time.

    Args:
        order: An order that :func:`verify_order` accepts.
    """
    most = 0
    for actions in order.actions:
        held: Counter[int] = Counter()
        for action in actions:
            if action.kind == "forward":
                held[action.micro_batch] += 1
            elif action.kind != "input":
                held[action.micro_batch] -= 1
            most = max(most, sum(count > 0 for count in held.values()))
    return most


def _verify_passes(order: Order, rank: int, actions: Sequence[Action]) -> None:
    own = {stage for stage, owner in enumerate(order.ranks) if owner == rank}
    forward = dict.fromkeys(own, 0)
    open_: dict[tuple[int, int], str] = {}  # what a micro-batch that is held waits for
    for action in actions:
        stage, i = action.stage, action.micro_batch
        if stage not in own:
            raise ConfigurationError(
                f"Rank {rank} must compute passes of its stages {sorted(own)}, got {_named(action)}."
            )
        if action.kind == "forward":
            is_due = i == forward[stage] < order.micro_batches
            forward[stage] += 1
            open_[stage, i] = "backward"
        elif action.kind == "input":
            is_due = open_.get((stage, i)) == "backward"
            open_[stage, i] = "weight"
        else:
            is_due = open_.pop((stage, i), None) == action.kind
        if not is_due:
            raise ConfigurationError(
                f"A stage must compute the forward pass of each micro-batch once, in order, and then its backward pass"
                f" or the two parts of it, got {_named(action)} out of turn on rank {rank}."
            )
    if open_ or any(count != order.micro_batches for count in forward.values()):
        raise ConfigurationError(
            f"Rank {rank} must compute a forward and a backward pass of each of {order.micro_batches} micro-batches in"
            f" each of its stages, got forward passes {forward} and passes that are missing for {sorted(open_)}."
        )


def _stuck(order: Order) -> tuple[int, Action] | None:
    """Return a pass that waits for ever, and its rank; None if there is none."""
    done: set[tuple[bool, int, int]] = set()  # whether it is backward, stage, micro-batch
    waiting = [iter(actions) for actions in order.actions]
    next_: list[Action | None] = [next(actions, None) for actions in waiting]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(waiting):
            while (action := next_[rank]) is not None and _is_ready(order, action, done):
                if action.kind != "weight":
                    done.add((action.kind != "forward", action.stage, action.micro_batch))
                next_[rank] = next(actions, None)
                moved = True
    return next(((rank, action) for rank, action in enumerate(next_) if action is not None), None)


def _is_ready(order: Order, action: Action, done: set[tuple[bool, int, int]]) -> bool:
    return all(needed in done for needed in _needed(order, action))


def _needed(order: Order, action: Action) -> Iterator[tuple[bool, int, int]]:
    kind, stage, i = action
    if kind == "forward":
        if stage:
            yield False, stage - 1, i
    elif kind != "weight" and stage < order.num_stages - 1:
        yield True, stage + 1, i


def _named(action: Action) -> str:
    return f"{action.kind} of micro-batch {action.micro_batch} in stage {action.stage}"
