"""Replicas of unequal pipelines train as one device does; on real gloo ranks."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import RankPools
from lightning.pytorch import Trainer
from profiles import thorough
from replica_trainings import Case, Outcome, largest_difference, planned, train, with_shares

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.balance.pipeline.orders.order import Order
from lightning_hetero.balance.pipeline.replicas.given import uniform_replicas
from lightning_hetero.balance.pipeline.replicas.orders.ordered_solver import OrderedReplicas, solve_ordered_replicas
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.distributed.pipeline.passes.links import pairs_of_links
from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.plugin.pipeline import runtime
from lightning_hetero.plugin.pipeline.replicas import planning
from lightning_hetero.plugin.pipeline.replicas.planning import ReplicaFindings, report_replicas
from lightning_hetero.plugin.pipeline.replicas.seat import Seat

TOLERANCE = 1e-10


def often(case: Case) -> Any:
    """Return a case that is run in the thorough profile only."""
    return pytest.param(case, marks=thorough)


CASES: list[Any] = [
    # one rank against a slower one, ragged ends of two samples, of which the slower gets one
    Case(((0,), (1,)), (1.0, 3.0), optimizer="sgd", trainer=(("accumulate_grad_batches", 2),)),
    # unequal lengths, a loss that averages over weights, whole model clipped
    Case(((0, 2), (1,)), (1.0, 2.0, 1.0), terms=True, trainer=(("gradient_clip_val", 0.05),)),
    # a first replica of one rank, weights tied across the border of the other
    often(Case(((0,), (2, 1)), (2.0, 1.0, 3.0), tied=(0, 2), micro_batches=3, schedule="gpipe")),
    # two borders, which cross
    Case(((0, 3), (1, 2)), (3.0, 1.0, 1.0, 3.0), layers=7, tied=(1, 5), trainer=(("gradient_clip_val", 0.1),)),
    # three stages beside one, of which one trains nothing, and fewer samples than replicas in the last batch
    Case(
        ((0, 1, 3), (2,)), (1.0, 3.0, 5.0, 1.0), samples=17, terms=True, epochs=1,
        trainer=(("gradient_clip_val", 0.01), ("gradient_clip_algorithm", "value")),
    ),
    # stages that are found by timing, then replicas too
    often(Case(((3, 1), (2,), (0,)), None, batch_size=5, samples=21, micro_batches=1)),
    Case(((0, 1, 2),), replicas=2, tied=(0, 2), terms=True),
    Case(((0, 1, 2),), replicas="auto", schedule="auto"),
]  # fmt: skip
PLANNED: list[Any] = [
    # in both replicas the first rank has both ends of the model; fewer micro-batches at the end than planned
    Case(
        ((0, 3), (1, 2)), micro_batches=4, schedule="auto", layers=7, tied=(1, 5), terms=True, way="split v",
        trainer=(("gradient_clip_val", 0.05), ("accumulate_grad_batches", 2)),
    ),
    # a replica of one rank beside one in which gradients of parameters are put off; the shares change
    Case(
        ((0, 2), (1,)), micro_batches=3, schedule="auto", batch_size=7, optimizer="sgd", way="split",
        plans=tuple(partial(with_shares, shares) for shares in [(1, 3), (40, 1), (2, 1)]),
    ),
    # three ranks in a V
    often(Case(((0, 2, 1), (3,)), micro_batches=4, schedule="v", layers=6, tied=(0, 2), way="v")),
]  # fmt: skip


def check(found: list[Outcome], expected: Outcome) -> None:
    for outcome in found:
        assert largest_difference(outcome, expected) < TOLERANCE
        assert outcome.metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-6)  # Lightning keeps float32
        assert outcome.plan == found[0].plan


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.replicas or case.groups))
def test_replicas_train_as_one_device(ranks: RankPools, case: Case) -> None:
    check(ranks.run(case.world_size, train, case, timeout_s=90), train(case))


@pytest.mark.parametrize("case", PLANNED, ids=lambda case: case.way)
def test_replicas_with_planned_orders_train_as_one_device(ranks: RankPools, case: Case) -> None:
    found = ranks.run(case.world_size, train, case, timeout_s=90)
    check(found, train(case))
    assert case.way is not None
    for outcome in found:
        assert len(outcome.changes) == len(case.plans)
        assert case.way in outcome.ways
        firsts = outcome.plan.replicas[0].stages
        assert (firsts.num_stages > firsts.world_size) == ("v" in case.way.split())


@thorough
@pytest.mark.parametrize("seed", range(60))
def test_drawn_planned_replicas_train_as_one_device(ranks: RankPools, seed: int) -> None:
    case, generator = drawn_case(seed), random.Random(-seed)
    while max(map(len, case.groups)) == 1:
        case = drawn_case(generator.randint(100, 10_000))
    way = generator.choice(["v", "split", "split v"])
    # some number of replicas, with which there is one of several ranks
    count = generator.choice([None, max(len(case.groups) - 1, 1)])
    case = replace(
        case, schedule=generator.choice(["auto", "v"]), speeds=None, way=way, layers=max(case.layers, 6), replicas=count
    )
    check(ranks.run(case.world_size, train, case, timeout_s=90), train(case))


def test_it_is_said_how_each_replica_runs_and_why() -> None:
    costs = LayerCosts.of_speeds([(0.01, 0.02)] * 12, [2, 2, 1, 1])
    problem = ReplicaProblem(costs, 32, 8, 2.0, replicas=((0, 2), (1, 3)))
    ordered = solve_ordered_replicas(problem)
    lines: list[str] = []
    with mock.patch.object(planning, "say", lambda _, line: lines.append(line)):
        findings = ReplicaFindings(ordered.solution.plan, problem, ordered.solution, (0.0,) * 12, ordered)
        report_replicas(Trainer(logger=False), findings, None)
    assert re.search(r'\[.*\] layers on ranks \[0, 2, 0\], and 50% of the samples, schedule "v"$', lines[0])
    assert "ranks [1, 3, 1]" in lines[1]
    assert re.search(r"predicted were 2 replicas 1f1b \d+ ms, v \d+ ms", lines[2])
    assert "of the limit" in lines[3]
    assert [type(order) for order in findings.orders] == [Order, Order]


def stuck(case: Case) -> str:
    """Train with an order in which the ranks of the second replica wait for each other for ever."""

    def solve(*args: Any, **options: Any) -> OrderedReplicas:
        found = planned("v", *args, **options)
        *others, last = found.orders
        assert last is not None
        actions = tuple(own[::-1] for own in last.actions)
        return replace(found, orders=(*others, replace(last, actions=actions)))

    with mock.patch.object(planning, "solve_ordered_replicas", solve):
        try:
            train(replace(case, way=None))
        except ConfigurationError as error:
            return str(error)
    return ""


def test_orders_that_do_not_end_are_refused_on_every_rank(ranks: RankPools) -> None:
    case = Case(((0, 3), (1, 2)), micro_batches=4, schedule="auto")
    for message in ranks.run(case.world_size, stuck, case, timeout_s=60):
        assert "pipeline" in message or "stage" in message


def drawn_case(seed: int) -> Case:
    generator = random.Random(seed)
    world_size = generator.randint(2, 4)
    others = list(range(1, world_size))
    generator.shuffle(others)
    order = [0, *others]
    cuts = sorted(generator.sample(range(1, world_size), generator.randint(1, world_size - 1)))
    groups = tuple(tuple(order[a:b]) for a, b in zip((0, *cuts), (*cuts, world_size), strict=True))
    layers = generator.randint(5, 9)
    tied = None
    if generator.random() < 0.4:  # two linear layers, or two with an activation; not the frozen one
        first = generator.randrange(layers - 4)
        tied = (first, first + 2)
    options: list[tuple[str, Any]] = []
    if generator.random() < 0.4:
        options.append(("accumulate_grad_batches", generator.randint(2, 3)))
    clips = generator.choice([None, None, "norm", "value"])
    if clips is not None:
        options += [("gradient_clip_val", 0.05 if clips == "norm" else 0.01), ("gradient_clip_algorithm", clips)]
    return Case(
        groups,
        tuple(generator.choice([1.0, 1.5, 2.0, 4.0]) for _ in range(world_size)) if generator.random() < 0.8 else None,
        micro_batches=generator.randint(1, 5),
        schedule=generator.choice(["1f1b", "gpipe"]),
        samples=generator.randint(9, 30),
        batch_size=generator.randint(3, 9),
        layers=layers,
        tied=tied,
        optimizer=generator.choice(["sgd", "adamw"]),
        terms=generator.random() < 0.5,
        epochs=generator.randint(1, 2),
        trainer=tuple(options),
    )


@thorough
@pytest.mark.parametrize("seed", range(66))
def test_drawn_replicas_train_as_one_device(ranks: RankPools, seed: int) -> None:
    case = drawn_case(seed)
    check(ranks.run(case.world_size, train, case, timeout_s=90), train(case))


def train_broken(case: Case, what: str) -> Outcome:
    if what == "sums":
        with mock.patch.object(runtime, "begin_sums", return_value=None):
            return train(case)
    if what == "weights":  # each micro-batch counts as in a single pipeline
        with mock.patch(
            "lightning_hetero.plugin.pipeline.strategy.loss_weights", lambda parts, *_, **__: [0.5] * len(parts)
        ):
            return train(case)
    with mock.patch("lightning_hetero.plugin.pipeline.step.repeat", return_value=None):
        return train(case)


@thorough
@pytest.mark.parametrize("what", ["sums", "weights", "repeat"])
def test_the_comparison_notices_what_is_wrong(ranks: RankPools, what: str) -> None:
    case = CASES[0]
    found = ranks.run(case.world_size, train_broken, case, what, timeout_s=90)[1]
    with pytest.raises(AssertionError):
        check([found], train(case))


def train_and_listen(case: Case) -> tuple[Outcome, str]:
    with mock.patch("lightning_hetero.plugin.pipeline.replicas.planning.say") as say:
        outcome = train(case)
    return outcome, "\n".join(call.args[1] for call in say.call_args_list)


def test_one_pipeline_is_taken_where_several_could_not_train_and_that_is_said(ranks: RankPools) -> None:
    case = Case(((0, 1),), replicas="auto", normalised=True, micro_batches=1, verbose=True)
    expected = train(case)
    for outcome, said in ranks.run(2, train_and_listen, case, timeout_s=90):
        (replica,) = outcome.plan.replicas
        assert largest_difference(outcome, expected) < TOLERANCE
        order = [replica.ranks[own] for own in replica.stages.ranks]
        assert "one pipeline, because the statistics of batch normalisation would be those of each replica's" in said
        assert re.search(
            rf"replica 0 has \[\d, \d\] layers on ranks {re.escape(str(order))}, and 100% of the samples", said
        )
        assert "per step, of which adding up gradients after the last pass takes 0 ms" in said


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_go_to_other_groupings_and_to_one_device(ranks: RankPools, tmp_path: Path) -> None:
    def path(name: str) -> str:
        return str(tmp_path / f"{name}.ckpt")

    # in order: one device has a plain loader's shuffling in no checkpoint
    three = Case(((0, 2), (1,)), (1.0, 2.0, 1.0), epochs=1, shuffle=False)
    other = Case(((0, 1), (2,)), micro_batches=4, epochs=2, shuffle=False, schedule="v", way="split v")
    one = Case(((0, 1),), epochs=3, shuffle=False, replicas=1)
    last = Case((), epochs=4, shuffle=False)
    ranks.run(3, train, three, None, path("three"), timeout_s=90)
    ranks.run(3, train, other, path("three"), path("other"), timeout_s=90)
    ranks.run(2, train, one, path("other"), path("pipeline"), timeout_s=90)
    found = train(last, path("pipeline"), path("last"))
    for number, case in enumerate((three, other, one)):
        assert train(case, path("one") if number else None, path("one")).losses
    expected = train(last, path("one"), path("one"))
    assert largest_difference(found, expected) < TOLERANCE
    ours, theirs = (torch.load(path(name), weights_only=True) for name in ("last", "one"))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    for a, b in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert a["state"].keys() == b["state"].keys()


# ---- the division of batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 24])
def test_each_sample_belongs_to_one_micro_batch(samples: int) -> None:
    plan = uniform_replicas(6, [(0, 4), (1,), (3, 2)])
    seats = [Seat(plan, rank) for rank in range(plan.world_size)]
    sizes = seats[0].divided(samples, 2)[0]
    assert sum(sizes) == samples
    assert all(seat.divided(samples, 2)[0] == sizes for seat in seats)
    of_replicas = [seats[rank].divided(samples, 2)[1] for rank in (0, 1, 3)]
    assert [i for own in of_replicas for i in own] == list(range(len(sizes)))
    assert of_replicas[0], "the first replica says what a step returns"
    assert all(size > 0 for size in sizes)


def test_one_pipeline_divides_as_ever() -> None:
    seat = Seat(StagePlan((1, 0), (2, 4)), 1)
    assert seat.divided(7, 3) == ([3, 2, 2], range(3))
    assert (seat.leader, seat.others, seat.first_rank, seat.has_replicas) == (0, [], 1, False)


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "pairs"),
    [([0], (None, None)), ([0, 0, 0], ((0, 1), None)), ([0, 1], (None, (0, 1))), ([0, 1, 1], ((1, 2), (0, 1)))],
)
def test_links_within_and_between_nodes(nodes: list[int], pairs: Any) -> None:
    assert pairs_of_links(nodes) == pairs


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicas": 0}, "at least 1"),
        ({"replicas": True}, "replicas"),
        ({"replicas": "many"}, "'auto'"),
        ({"replicas": []}, r"\[\[0, 3\], \[1, 2\]\]"),
        ({"replicas": [[0, 1], []]}, "ranks of each replica"),
        ({"replicas": [[0, 1], [1]]}, "each rank once"),
        ({"replicas": [[1], [2, 0]]}, "first of its replica"),
        ({"replicas": [[0], [1]], "splits": [3]}, "Leave out `splits`"),
        ({"replicas": 2, "schedule": "v", "speeds": [1, 2]}, "found by timing"),
        ({"replicas": "auto", "speeds": [1, 2]}, "timed"),
        ({"replicas": "auto", "schedule": "zigzag"}, "'auto', '1f1b', 'gpipe', 'v'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HeteroPipelineStrategy(**arguments)


@pytest.mark.parametrize(
    ("replicas", "message"), [(4, "at most the number of ranks"), ([[0], [1]], "from 0 to 2"), ([[0, 1], [3]], "once")]
)
def test_replicas_that_do_not_fit_the_ranks_are_refused(replicas: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HeteroPipelineStrategy(replicas=replicas).check_world_size(3)
