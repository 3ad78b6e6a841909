"""Orders of passes are proven to end, simulated, and found by list scheduling under limits of memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import random_order, random_ranks
from profiles import drawn

from lightning_hetero.balance.pipeline.orders.listing import Choices, Listing, Task, bound_s, list_schedule
from lightning_hetero.balance.pipeline.orders.merging import with_whole_passes
from lightning_hetero.balance.pipeline.orders.order import Action, Order, forward_order, known_order
from lightning_hetero.balance.pipeline.orders.proof import most_held, most_micro_batches, verify_order
from lightning_hetero.balance.pipeline.simulation import PassTimes, order_step_s, simulate_order
from lightning_hetero.exceptions import ConfigurationError


def equal_times(stages: int, micro_batches: int, weight_s: float = 1.0) -> PassTimes:
    rows = [[(seconds,) * micro_batches] * stages for seconds in (1.0, 2.0 - weight_s, weight_s)]
    return PassTimes(*rows)


@settings(max_examples=drawn(100, 10_000))
@given(st.integers(0, 2**32), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 4)))
def test_drawn_orders_are_proven_to_end_and_hold_what_they_may(seed: int, count: int, most: int | None) -> None:
    random = Random(seed)
    ranks = random_ranks(random)
    order = random_order(random, ranks, count, most)
    held = (1.0,) * len(ranks)
    caps = [(count if most is None else most) * ranks.count(rank) for rank in range(max(ranks) + 1)]
    verify_order(order, held, caps)
    assert simulate_order(order, equal_times(len(ranks), count)).step_s >= 3.0 * count


@settings(max_examples=drawn(100, 5_000))
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_an_order_ends_exactly_if_the_proof_says_so(seed: int, count: int) -> None:
    """Two passes of a rank change places: either a rule of one stage is broken, or ranks would wait in a circle."""
    random = Random(seed)
    order = random_order(random, random_ranks(random), count)
    rank = random.randrange(len(order.actions))
    actions = list(order.actions[rank])
    a, b = random.randrange(len(actions)), random.randrange(len(actions))
    actions[a], actions[b] = actions[b], actions[a]
    changed = replace(order, actions=(*order.actions[:rank], tuple(actions), *order.actions[rank + 1 :]))
    try:
        verify_order(changed)
    except ConfigurationError:
        assert not ends(changed)
    else:
        assert ends(changed)


def ends(order: Order) -> bool:
    """Whether each rank comes to the end of its passes if each computes what it can; by other means than the proof."""
    done: list[Action] = []
    at = [0] * len(order.actions)
    while any(position < len(actions) for position, actions in zip(at, order.actions, strict=True)):
        ready = [
            rank
            for rank, actions in enumerate(order.actions)
            if at[rank] < len(actions) and can_run(order, actions[at[rank]], done)
        ]
        if not ready:
            return False
        done.append(order.actions[ready[-1]][at[ready[-1]]])
        at[ready[-1]] += 1
    return True


def can_run(order: Order, action: Action, done: list[Action]) -> bool:
    kind, stage, i = action

    def has(stage: int, *kinds: str) -> bool:
        return any((kind, stage, i) in done for kind in kinds)

    if kind == "forward":
        return (not stage or has(stage - 1, "forward")) and (not i or ("forward", stage, i - 1) in done)
    if kind == "weight":
        return has(stage, "input")
    is_last = stage == order.num_stages - 1
    return has(stage, "forward") and (is_last or has(stage + 1, "backward", "input"))


def broken(*actions: Any) -> Order:
    return Order((0,), 1, (tuple(Action(*a) for a in actions),))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (broken(("forward", 0, 0)), "passes that are missing"),
        (broken(("backward", 0, 0), ("forward", 0, 0)), "out of turn"),
        (broken(("forward", 0, 0), ("weight", 0, 0)), "out of turn"),
        (broken(("forward", 0, 0), ("input", 0, 0), ("backward", 0, 0)), "out of turn"),
        (broken(("forward", 0, 0), ("backward", 0, 0), ("weight", 0, 0)), "out of turn"),
        (broken(("forward", 0, 0), ("backward", 0, 0), ("forward", 0, 0)), "out of turn"),
        (broken(("forward", 1, 0)), "its stages"),
        (Order((0, 1), 1, known_order([0, 1], 1, "1f1b").actions[::-1]), "its stages"),
    ],
)
def test_broken_orders_are_refused_by_their_fault(order: Order, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        verify_order(order)


def test_a_circle_of_waiting_ranks_is_found() -> None:
    first, second = known_order([0, 1], 2, "1f1b").actions
    backward_first = Action("backward", 0, 1), *(a for a in first if a != ("backward", 0, 1))
    with pytest.raises(ConfigurationError, match="out of turn"):
        verify_order(Order((0, 1), 2, (backward_first, second)))
    # rank 0 wants a gradient back before it sends the next micro-batch, and rank 1 wants that first
    first = known_order([0], 2, "1f1b").actions[0]
    second = known_order([0, 1], 2, "gpipe").actions[1]
    with pytest.raises(ConfigurationError, match="rank 0 would wait for ever before backward of micro-batch 0"):
        verify_order(Order((0, 1), 2, (first, second)))


def test_what_is_held_beyond_the_cap_is_refused() -> None:
    order = known_order([0, 1], 4, "gpipe")
    assert most_held(order, (2.0, 1.0)) == (8.0, 4.0)
    with pytest.raises(ConfigurationError, match="Rank 0 must hold at most 6"):
        verify_order(order, (2.0, 1.0), (6.0, 4.0))
    assert most_held(known_order([0, 1, 2], 4, "1f1b"), (1.0,) * 3) == (3.0, 2.0, 1.0)
    assert most_micro_batches(known_order([0, 1, 2], 4, "1f1b")) == 3
    both = [
        one for i in range(2) for one in (Action("forward", 0, i), Action("forward", 2, i), Action("backward", 2, i))
    ]
    between = [one for i in range(2) for one in (Action("forward", 1, i), Action("backward", 1, i))]
    late = [Action("backward", 0, 0), Action("backward", 0, 1)]
    v = Order((0, 1, 0), 2, ((*both, *late), tuple(between)))
    verify_order(v)
    assert most_micro_batches(v) == 2


@given(st.integers(1, 6), st.integers(1, 9))
def test_known_orders_are_accepted(stages: int, count: int) -> None:
    verify_order(known_order(range(stages), count, "1f1b"))
    verify_order(known_order(range(stages), count, "gpipe"))


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_evaluation_runs_every_micro_batch_through_every_stage(seed: int, count: int) -> None:
    ranks = random_ranks(Random(seed))
    order = forward_order(ranks, count)
    everything = [action for actions in order.actions for action in actions]
    assert sorted(everything) == sorted(Action("forward", s, i) for s in range(len(ranks)) for i in range(count))
    backward = [
        (*own, *(Action("backward", s, i) for s in reversed(range(len(ranks))) if ranks[s] == r for i in range(count)))
        for r, own in enumerate(order.actions)
    ]
    verify_order(Order(ranks, count, tuple(backward)))  # what is sent and received can then be received in order


def test_a_v_does_not_send_one_micro_batch_after_the_other_through_evaluation() -> None:
    order = forward_order((0, 1, 0), 8)
    times = PassTimes([(1.0,) * 8] * 3, [()] * 3, [()] * 3)
    assert simulate_order(order, times).step_s <= 2 * 8 + 2


@given(st.integers(0, 2**32))
def test_messages_are_those_that_are_needed_elsewhere(seed: int) -> None:
    random = Random(seed)
    order = random_order(random, random_ranks(random), 3)
    world_size, stages = len(order.actions), order.num_stages
    found = [m for a in range(world_size) for b in range(world_size) for m in order.messages(a, b)]
    crossed = sum(a != b for a, b in zip(order.ranks, order.ranks[1:], strict=False))
    assert len(found) == len({*found}) == 2 * 3 * crossed
    assert all(0 <= message.stage < stages for message in found)


# ---- list scheduling -----------------------------------------------------------------------------------------------


@settings(max_examples=drawn(100, 5_000), deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 4), st.floats(0, 1), st.booleans(), st.floats(0, 0.5))
def test_list_schedules_are_valid_within_the_caps_and_never_beat_the_bound(
    seed: int, count: int, most: int, transfer_s: float, is_split: bool, noise: float
) -> None:
    random = Random(seed)
    ranks = random_ranks(random)

    def row(largest: float) -> list[tuple[float, ...]]:
        return [tuple(random.uniform(0, largest) for _ in range(count)) for _ in ranks]

    times = PassTimes(row(1.0), row(1.0), row(1.0) if is_split else [(0.0,) * count] * len(ranks))
    held = tuple(random.uniform(0.5, 2.0) for _ in ranks)
    full = [sum(h for h, r in zip(held, ranks, strict=True) if r == rank) for rank in range(max(ranks) + 1)]
    task = Task(ranks, times, held, tuple(most * whole for whole in full), transfer_s)
    choices = Choices(random.random() < 0.5, random.choice((0.0, 0.5, 1.0)), noise, random)
    found = list_schedule(task, choices)
    assert found is not None
    order, step_s = found
    verify_order(order, held, task.caps)
    assert simulate_order(order, times, transfer_s).step_s == pytest.approx(step_s)
    assert step_s >= bound_s(task) * (1 - 1e-9)
    choices = replace(choices, random=None)
    order, step_s = Listing(task).list(choices) or pytest.fail("it fits")
    assert Listing(task).list(choices, step_s * (1 + 1e-9)) == (order, step_s)
    assert Listing(task).list(choices, step_s * (1 - 1e-9)) is None, "no order that is fast enough"
    too_small = replace(task, caps=tuple(0.9 * whole for whole in full))
    assert list_schedule(too_small, choices) is None


def test_small_steps_are_scheduled_as_well_as_by_brute_force() -> None:
    """All orders of two stages on two ranks, with one whole backward pass per micro-batch."""
    times = PassTimes([(1.0, 1.0), (2.0, 2.0)], [(2.0, 2.0), (4.0, 4.0)], [(0.0, 0.0)] * 2)
    task = Task((0, 1), times, (1.0, 1.0), (2.0, 2.0))
    best = min(
        simulate_order(order, times).step_s
        for a in permutations([Action(k, 0, i) for k in ("forward", "backward") for i in range(2)])
        for b in permutations([Action(k, 1, i) for k in ("forward", "backward") for i in range(2)])
        if is_valid(order := Order((0, 1), 2, (a, b)))
    )
    found = list_schedule(task)
    assert found is not None
    assert found[1] == best


def is_valid(order: Order) -> bool:
    try:
        verify_order(order)
    except ConfigurationError:
        return False
    return True


@settings(max_examples=drawn(50, 2_000), deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.floats(0.8, 1.5), st.floats(0, 0.5))
def test_backward_passes_are_whole_where_nothing_is_lost(seed: int, count: int, cost: float, transfer_s: float) -> None:
    random = Random(seed)
    ranks = random_ranks(random)
    order = random_order(random, ranks, count)
    forward, inputs, weights = [
        [tuple(random.uniform(0.1, 1.0) for _ in range(count)) for _ in ranks] for _ in range(3)
    ]
    whole = [tuple((a + b) / cost for a, b in zip(*two, strict=True)) for two in zip(inputs, weights, strict=True)]
    times = PassTimes(forward, inputs, weights, whole)
    before_s = simulate_order(order, times, transfer_s).step_s
    joined, step_s = with_whole_passes(order, times, transfer_s)
    verify_order(joined)
    assert step_s == simulate_order(joined, times, transfer_s).step_s == order_step_s(joined, times, transfer_s)
    assert step_s <= before_s
    held = (1.0,) * len(ranks)
    for most, most_before in zip(most_held(joined, held), most_held(order, held), strict=True):
        assert most <= most_before


def test_what_splitting_costs_is_paid_only_where_it_is_useful() -> None:
    """Two ranks: the second one never waits, and the first one has no parts."""
    rows = [[(seconds,) * 4] * 2 for seconds in (1.0, 1.2, 1.2, 2.0)]
    task = Task((0, 1), PassTimes(*rows), (1.0, 1.0), (4.0, 4.0))
    order, hoped_s = list_schedule(task) or pytest.fail("it fits")
    assert bound_s(task) <= hoped_s
    joined, step_s = with_whole_passes(order, task.times)
    assert step_s < simulate_order(order, task.times).step_s
    assert any(a.kind == "backward" for a in joined.actions[1])
    alike = replace(task, times=PassTimes(*rows[:3]))
    assert bound_s(alike) > bound_s(task), "where parts take longer than the whole, an order need not have them"


def test_weight_gradients_fill_the_time_in_which_a_rank_would_wait() -> None:
    """Qi et al.: with as many micro-batches held as it takes, only the first fill remains."""
    whole = Task((0, 1), equal_times(2, 8, weight_s=0.0), (1.0, 1.0), (8.0, 8.0))
    split = replace(whole, times=equal_times(2, 8))
    (_, whole_s), (order, split_s) = (list_schedule(task) or pytest.fail("fits") for task in (whole, split))
    assert whole_s == 3.0 * 8 + 3
    assert split_s == bound_s(split) == 3.0 * 8 + 1
    assert {a.kind for a in order.actions[0]} == {"forward", "backward"}, "nobody waits for the first stage"
