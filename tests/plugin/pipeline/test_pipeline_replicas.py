"""Replicas of unequal pipelines train as one device does; on real gloo ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import RankPools
from profiles import thorough
from replica_trainings import Case, Outcome, largest_difference, train

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.balance.pipeline.replicas.given import uniform_replicas
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.distributed.pipeline.passes.links import pairs_of_links
from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.plugin.pipeline import runtime
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
    # three stages beside one, and fewer samples than replicas in the last batch
    Case(((0, 1, 3), (2,)), (1.0, 1.0, 5.0, 2.0), samples=17, terms=True, epochs=1),
    # stages that are found by timing, then replicas too
    often(Case(((3, 1), (2,), (0,)), None, batch_size=5, samples=21, micro_batches=1)),
    Case(((0, 1, 2),), replicas=2, tied=(0, 2), terms=True),
    Case(((0, 1, 2),), replicas="auto"),
]


def check(found: list[Outcome], expected: Outcome) -> None:
    for outcome in found:
        assert largest_difference(outcome, expected) < TOLERANCE
        assert outcome.metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-6)  # Lightning keeps float32
        assert outcome.plan == found[0].plan


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.replicas or case.groups))
def test_replicas_train_as_one_device(ranks: RankPools, case: Case) -> None:
    check(ranks.run(case.world_size, train, case, timeout_s=90), train(case))


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


def test_one_pipeline_is_taken_where_several_could_not_train(ranks: RankPools) -> None:
    case = Case(((0, 1),), replicas="auto", normalised=True, micro_batches=1)
    for outcome in ranks.run(2, train, case, timeout_s=90):
        assert len(outcome.plan.replicas) == 1
        assert largest_difference(outcome, train(case)) < TOLERANCE


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_go_to_other_groupings_and_to_one_device(ranks: RankPools, tmp_path: Path) -> None:
    def path(name: str) -> str:
        return str(tmp_path / f"{name}.ckpt")

    # in order: one device has a plain loader's shuffling in no checkpoint
    three = Case(((0, 2), (1,)), (1.0, 2.0, 1.0), epochs=1, shuffle=False)
    two = Case(((0,), (1,)), (2.0, 1.0), epochs=2, shuffle=False)
    last = Case((), epochs=3, shuffle=False)
    ranks.run(3, train, three, None, path("three"), timeout_s=90)
    ranks.run(2, train, two, path("three"), path("two"), timeout_s=90)
    found = train(last, path("two"), path("last"))
    first, second = (train(case, None if n == 0 else path("one"), path("one")) for n, case in enumerate((three, two)))
    expected = train(last, path("one"), path("one"))
    assert first.losses
    assert second.losses
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
        ({"replicas": 2, "schedule": "v"}, '"auto", "1f1b" or "gpipe"'),
        ({"replicas": "auto", "speeds": [1, 2]}, "timed"),
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
