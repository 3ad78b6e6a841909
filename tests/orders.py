"""Random orders of passes, each of which ends: one pass after another is drawn from those that could be computed."""

from __future__ import annotations

from random import Random

from lightning_hetero.balance.pipeline.orders.order import Action, Order

__all__ = ["random_order", "random_ranks"]


def random_ranks(random: Random, most_ranks: int = 4, most_stages: int = 6) -> tuple[int, ...]:
    """Draw the rank of each stage; consecutive stages are on different ranks, unless there is only one."""
    world_size = random.randint(1, most_ranks)
    if world_size == 1:
        return (0,)
    while True:
        ranks = [random.randrange(world_size)]
        for _ in range(random.randint(world_size, most_stages) - 1):
            ranks.append(random.choice([r for r in range(world_size) if r != ranks[-1]]))
        if {*ranks} == {*range(world_size)}:
            return tuple(ranks)


def random_order(random: Random, ranks: tuple[int, ...], micro_batches: int, most_held: int | None = None) -> Order:
    """Draw an order; with ``most_held``, so many micro-batches are within a rank at a time.

    Backward passes are in any order of micro-batches, and some are split in two parts.
    """
    actions: list[list[Action]] = [[] for _ in range(max(ranks) + 1)]
    forward = [0] * len(ranks)
    backward: set[tuple[int, int]] = set()
    open_: set[tuple[int, int]] = set()
    released: set[tuple[int, int]] = set()
    first = [ranks.index(rank) for rank in range(max(ranks) + 1)]
    most = micro_batches if most_held is None else most_held

    def has_room(stage: int) -> bool:
        rank = ranks[stage]
        inside = forward[first[rank]] - sum(
            all((s, i) in released for s, r in enumerate(ranks) if r == rank) for i in range(micro_batches)
        )
        return stage != first[rank] or inside < most

    def possible() -> list[Action]:
        found = [Action("weight", *one) for one in sorted(open_)]
        for stage in range(len(ranks)):
            i = forward[stage]
            if i < micro_batches and (not stage or i < forward[stage - 1]) and has_room(stage):
                found.append(Action("forward", stage, i))
            found += [
                Action(random.choice(("backward", "input")), stage, i)
                for i in range(forward[stage])
                if (stage, i) not in backward and (stage == len(ranks) - 1 or (stage + 1, i) in backward)
            ]
        return found

    while choices := possible():
        action = random.choice(choices)
        actions[ranks[action.stage]].append(action)
        place = (action.stage, action.micro_batch)
        if action.kind == "forward":
            forward[action.stage] += 1
        elif action.kind == "weight":
            open_.remove(place)
        else:
            backward.add(place)
            if action.kind == "input":
                open_.add(place)
        if action.kind in ("backward", "weight"):
            released.add(place)
    return Order(ranks, micro_batches, tuple(map(tuple, actions)))
