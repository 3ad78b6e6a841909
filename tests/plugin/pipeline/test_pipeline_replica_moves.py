"""Shares and layers of replicas change between steps, and the training remains that of one device."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from profiles import thorough
from replica_trainings import Case, Deep, Outcome, largest_difference, loader_of, train
from training import flat, make_trainer

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.stages import StagePlan

TOLERANCE = 1e-10
Groups = tuple[tuple[int, ...], ...]


def plan_of(groups: Groups, borders: Sequence[Sequence[int]], shares: Sequence[float], layers: int = 5) -> ReplicaPlan:
    """Return replicas whose first rank has the last stage."""
    return ReplicaPlan(
        tuple(
            Replica(ranks, StagePlan((*range(1, len(ranks)), 0), (*inner, layers)), share)
            for ranks, inner, share in zip(groups, borders, shares, strict=True)
        )
    )


def often(case: Case) -> Any:
    """Return a case that is run in the thorough profile only."""
    return pytest.param(case, marks=thorough)


TWO: Groups = ((0,), (1,))
THREE: Groups = ((0, 2), (1,))
FOUR: Groups = ((0, 2), (1, 3))
LONG: Groups = ((0, 1, 3), (2,))
ALONE: Groups = ((0, 1, 2),)
# shares alone, layers alone, both, so few samples that a replica has none of the last batch, and back
OF_TWO = tuple(plan_of(TWO, [(), ()], shares) for shares in [(1, 3), (1, 40), (40, 1), (3, 2)])
OF_THREE = (
    plan_of(THREE, [(2,), ()], (1, 2.5)),
    plan_of(THREE, [(4,), ()], (1, 2.5)),
    plan_of(THREE, [(1,), ()], (2, 1)),
    plan_of(THREE, [(1,), ()], (50, 1)),
    plan_of(THREE, [(3,), ()], (50, 1)),
    plan_of(THREE, [(3,), ()], (1, 50)),
)
OF_FOUR = (
    plan_of(FOUR, [(1,), (4,)], (1, 2.5)),
    plan_of(FOUR, [(4,), (1,)], (1, 2.5)),
    plan_of(FOUR, [(4,), (1,)], (3, 1)),
    plan_of(FOUR, [(2,), (3,)], (1, 1)),
)
OF_LONG = (
    plan_of(LONG, [(1, 2), ()], (1, 2.5)),
    plan_of(LONG, [(3, 4), ()], (2, 1)),
    plan_of(LONG, [(1, 4), ()], (1, 50)),
)
OF_ONE = (plan_of(ALONE, [(1, 2)], (1,), 6), plan_of(ALONE, [(3, 4)], (1,), 6))

CASES: list[Any] = [
    often(Case(TWO, samples=25, epochs=3, plans=OF_TWO, terms=True, trainer=(("gradient_clip_val", 0.05),))),
    Case(THREE, samples=25, epochs=4, plans=OF_THREE, tied=(0, 2), trainer=(("gradient_clip_val", 0.05),)),
    Case(FOUR, epochs=4, plans=OF_FOUR, constant=True, terms=True, trainer=(("accumulate_grad_batches", 2),)),
    often(Case(THREE, samples=25, epochs=2, fits=2, plans=OF_THREE[1:5], tied=(1, 3), micro_batches=3)),
    # one pipeline of several that were allowed, with statistics that follow the samples
    often(Case(ALONE, replicas="auto", samples=24, epochs=3, plans=OF_ONE, normalised=True, micro_batches=1)),
    often(Case(LONG, samples=25, epochs=3, plans=OF_LONG, schedule="gpipe", optimizer="sgd")),
]


def check(found: list[Outcome], expected: Outcome) -> None:
    for outcome in found:
        assert largest_difference(outcome, expected) < TOLERANCE
        assert outcome.metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-6)  # Lightning keeps float32
        assert not outcome.warnings


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.groups} {case.replicas or case.fits}")
def test_parameters_are_those_of_one_device(ranks: RankPools, case: Case) -> None:
    """With losses, norms, metrics, outputs, evaluations and predictions, frozen layers and the states of Adam."""
    found = ranks.run(case.world_size, train, case, timeout_s=90)
    check(found, train(case))
    for outcome in found:
        assert [plan for _, plan in outcome.changes] == list(case.plans)
        assert outcome.plan == case.plans[-1]
        every = dict(case.trainer).get("accumulate_grad_batches", 1)
        assert all(step % every == 0 for step, _ in outcome.changes)


def drawn_case(seed: int) -> Case:
    generator = random.Random(seed)
    groups = generator.choice([TWO, THREE, FOUR, LONG, ((0,), (2, 1)), ((0, 2, 1), (3,)), ((0,), (1,), (2,))])
    layers = generator.randint(5, 9)
    plans: list[ReplicaPlan] = []
    for number in range(generator.randint(3, 6)):
        borders = [sorted(generator.sample(range(1, layers), len(ranks) - 1)) for ranks in groups]
        shares = [generator.choice([1.0, 1.5, 2.0, 5.0, 40.0]) for _ in groups]
        if number and generator.random() < 0.4:
            borders = [list(one.stages.ends[:-1]) for one in plans[-1].replicas]
        shares[0] += number / 100  # each plan is another one
        plans.append(plan_of(groups, borders, shares, layers))
    options: list[tuple[str, Any]] = []
    if generator.random() < 0.4:
        options.append(("accumulate_grad_batches", generator.randint(2, 3)))
    if generator.choice([False, True, False]):
        options.append(("gradient_clip_val", 0.05))
    first = generator.randrange(layers - 4)
    return Case(
        groups,
        micro_batches=generator.randint(1, 5),
        schedule=generator.choice(["1f1b", "gpipe"]),
        samples=generator.randint(20, 30),
        batch_size=generator.randint(4, 9),
        layers=layers,
        tied=(first, first + 2) if generator.random() < 0.4 else None,
        optimizer=generator.choice(["sgd", "adamw"]),
        terms=generator.random() < 0.5,
        epochs=generator.randint(5, 8),
        plans=tuple(plans),
        trainer=tuple(options),
    )


@thorough
@pytest.mark.parametrize("seed", range(30))
def test_drawn_changes_leave_the_training_as_it_is(ranks: RankPools, seed: int) -> None:
    case = drawn_case(seed)
    found = ranks.run(case.world_size, train, case, timeout_s=90)
    check(found, train(case))
    assert [plan for _, plan in found[0].changes] == list(case.plans)


def test_a_checkpoint_after_changes_is_resumed(ranks: RankPools, tmp_path: Path) -> None:
    path, other = str(tmp_path / "changed.ckpt"), str(tmp_path / "one.ckpt")
    first = Case(THREE, epochs=2, shuffle=False, plans=OF_THREE[:3])
    second = Case(TWO, epochs=4, shuffle=False, plans=OF_TWO[:2])
    ranks.run(3, train, first, None, path, timeout_s=90)
    train(first, None, other)
    saved, expected = (torch.load(one, weights_only=True) for one in (path, other))
    assert list(saved["state_dict"]) == list(expected["state_dict"])
    for ours, theirs in zip(saved["optimizer_states"], expected["optimizer_states"], strict=True):
        assert ours["state"].keys() == theirs["state"].keys()
        for key, state in theirs["state"].items():
            assert all(torch.allclose(ours["state"][key][name], state[name], rtol=0, atol=TOLERANCE) for name in state)
    found = ranks.run(2, train, second, path, timeout_s=90)
    check(found, train(second, other))
    assert [len(outcome.changes) for outcome in found] == [2, 2]


def fit_two_models(replicas: Any) -> list[list[float]]:
    """Train a model, and then one with more layers, with the same Trainer; return the parameters of both."""
    strategy = HeteroPipelineStrategy(replicas=replicas, num_microbatches=2, verbose=False, watch_steps=1)
    trainer = make_trainer(strategy, dist.get_world_size(), max_epochs=2)
    found = []
    for number, layers in enumerate((5, 8)):
        case = Case(TWO, layers=layers, optimizer="sgd")
        trainer.fit_loop.max_epochs = 2 * (number + 1)
        module = Deep(case)
        torch.manual_seed(11)
        trainer.fit(module, loader_of(case, shuffle=False))
        found.append(flat(module))
        plan: Any = strategy.replica_plan or strategy.plan
        findings: Any = strategy.replica_findings or strategy.findings
        assert plan.num_layers == layers
        assert findings.plan == plan
    return found


@thorough
@pytest.mark.parametrize("replicas", [1, 2])
def test_stages_of_another_model_are_found_again(ranks: RankPools, replicas: Any) -> None:
    first, second = ranks.run(2, fit_two_models, replicas, timeout_s=90)
    assert first == second
