"""Devices of replicas become slower and faster, and samples and layers move where they can."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from profiles import thorough
from stage_trainings import Averaged, Deep, known_times
from torch import nn
from training import assert_close, flat, make_trainer

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.balance.pipeline.replicas.orders.ordered_solver import solve_ordered_replicas
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.solver import solve_replicas
from lightning_hetero.balance.pipeline.stages import LayerCosts
from lightning_hetero.plugin.pipeline.replicas.planning import ReplicaFindings, find_replicas
from lightning_hetero.plugin.pipeline.watching import strategy as watching
from lightning_hetero.plugin.pipeline.watching import watcher

FEATURES, SAMPLES, STEPS = 6, 12, 75
SLOW_FROM, SLOW_UNTIL = 20, 45


class Stack(Deep):
    """Twelve layers without what replicas refuse."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        torch.manual_seed(3)
        layers: list[nn.Module] = [nn.Linear(FEATURES, FEATURES) for _ in range(12)]
        layers[3], layers[9] = nn.Tanh(), layers[2]
        layers[6].requires_grad_(False)
        self.model = nn.Sequential(*layers).double()

    def configure_optimizers(self) -> Any:
        if self.optimizer == "averages":
            return Averaged([p for p in self.parameters() if p.requires_grad], lr=0.05)
        return super().configure_optimizers()


@dataclass
class Drifted:
    """What a rank has seen of a training with devices that change."""

    first: ReplicaPlan
    plans: list[ReplicaPlan]  # of each step
    changes: list[tuple[int, ReplicaPlan]]
    lines: list[str]
    warnings: list[str]
    parameters: list[float]
    predicted_s: list[float]  # before the first step, and at the end


def steady(*arguments: Any) -> ReplicaFindings:
    """Return what was found, for equal layers, whatever else ran on this machine when they were measured."""
    found = find_replicas(*arguments)
    costs = LayerCosts.of_speeds([(0.001, 0.002)] * 12, [1.0] * dist.get_world_size())
    problem = replace(found.problem, costs=costs, overheads=None)
    solution = solve_replicas(problem)
    return replace(found, plan=solution.plan, problem=problem, solution=solution)


def steady_and_planned(*arguments: Any) -> ReplicaFindings:
    """Return the same for replicas in which the first rank has both ends of the model."""
    found = steady(*arguments)
    costs = LayerCosts.of_speeds([(0.01, 0.02)] * 12, [1.0] * dist.get_world_size())
    half = tuple(tuple(s / 2 for s in row) for row in costs.backward_s)
    problem = replace(found.problem, costs=replace(costs, input_s=half, weight_s=half))
    ordered = solve_ordered_replicas(problem, always_v=True)
    return replace(found, plan=ordered.solution.plan, problem=problem, solution=ordered.solution, ordered=ordered)


def data() -> Any:
    """Return batches of which the last one of each epoch is smaller."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(SAMPLES * 9 + 1, FEATURES, generator=generator, dtype=torch.float64)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(samples), SAMPLES)


def drift(
    replicas: Any,
    slow: tuple[float, ...],
    optimizer: str = "adamw",
    slow_from: int = SLOW_FROM,
    options: Any = None,
    find: Any = steady,
) -> Drifted:
    """Train while ranks take ``slow`` times as long in the middle of the training."""
    world_size = dist.get_world_size()
    strategy = HeteroPipelineStrategy(replicas=replicas, num_microbatches=4, schedule="1f1b")
    trainer = make_trainer(strategy, world_size, max_steps=STEPS, **(options or {}))
    module = Stack(optimizer)
    lines: list[str] = []
    warnings: list[str] = []
    plans: list[ReplicaPlan] = []
    predicted_s: list[float] = []

    def factors() -> list[float]:
        return list(slow) if slow_from <= trainer.fit_loop.total_batch_idx < SLOW_UNTIL else [1.0] * world_size

    def said(_: Any, message: str) -> None:
        lines.append(message)

    after_step = watcher.StageWatcher.after_step

    def note(self: watcher.StageWatcher) -> None:
        after_step(self)
        found, plan, running = strategy.replica_findings, strategy.replica_plan, strategy.runtime
        assert found is not None
        assert plan is not None
        assert running is not None
        assert plan == found.plan == found.solution.plan == running.placement.plan
        sizes, own = running.seat.divided(SAMPLES, 4)
        assert sum(sizes[i] for i in own) == plan.samples(SAMPLES)[running.seat.number]
        plans.append(plan)
        predicted_s.append(found.solution.step_s)

    with ExitStack() as stack:
        for context in (
            mock.patch.object(watcher, "say", said),
            mock.patch.object(watcher, "rank_zero_warn", warnings.append),
            mock.patch.object(watching, "find_replicas", find),
            mock.patch.object(watcher.StageWatcher, "after_step", note),
            known_times(factors),
        ):
            stack.enter_context(context)
        trainer.fit(module, data())
    changes: Any = [(change.step, change.plan) for change in strategy.changes]
    return Drifted(plans[0], plans, changes, lines, warnings, flat(module), [predicted_s[0], predicted_s[-1]])


def alone(optimizer: str = "adamw", options: Any = None) -> list[float]:
    from lightning.pytorch import Trainer

    module = Stack(optimizer)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **(options or {}),
    )  # fmt: skip
    trainer.fit(module, data())
    return flat(module)


def test_samples_and_layers_follow_a_slow_device_and_come_back(ranks: RankPools) -> None:
    options = {"gradient_clip_val": 0.3}
    found = ranks.run(4, drift, [[0, 2], [1, 3]], (1.0, 1.0, 1.0, 3.0), "adamw", SLOW_FROM, options, timeout_s=90)
    expected = alone(options=options)
    for outcome in found:
        assert outcome.changes == found[0].changes
        (slowed, relieved), *_, (recovered, last) = outcome.changes
        assert SLOW_FROM < slowed <= SLOW_UNTIL < recovered
        assert relieved.samples(SAMPLES)[1] < outcome.first.samples(SAMPLES)[1] == last.samples(SAMPLES)[1]
        held = [len(plan.layers_of(3)) for plan in (outcome.first, *outcome.plans)]
        assert min(held) < held[0] == held[-1]
        assert outcome.plans[slowed - 1] == outcome.first
        assert outcome.plans[slowed] == relieved
        assert "rank 3 takes 3.00 times as long as before; predicted: " in outcome.lines[0]
        assert "of the samples in replicas 0 and 1, [" in outcome.lines[0]
        assert f"] layers on ranks [3, 1] of replica 1 from training step {slowed} on (" in outcome.lines[0]
        assert outcome.predicted_s[1] == pytest.approx(outcome.predicted_s[0], rel=0.05)
        assert len(outcome.lines) == len(outcome.changes)
        assert not outcome.warnings
        assert_close(outcome.parameters, expected)


def test_samples_move_where_layers_cannot_and_a_warning_says_why(ranks: RankPools) -> None:
    expected = alone("averages")
    for outcome in ranks.run(3, drift, [[0, 2], [1]], (1.0, 1.0, 4.0), "averages", timeout_s=90):
        (warning,) = outcome.warnings
        assert "Averaged keeps tensors in 'averages'" in warning
        assert "layers on ranks [2, 0] of replica 0 would be faster (rank 2 takes 4.00 times as long" in warning
        assert "The shares of replicas still follow the devices." in warning
        assert {plan.replicas[0].stages for plan in outcome.plans} == {outcome.first.replicas[0].stages}
        assert min(plan.samples(SAMPLES)[0] for plan in outcome.plans) < outcome.first.samples(SAMPLES)[0]
        assert outcome.plans[-1].samples(SAMPLES) == outcome.first.samples(SAMPLES)
        assert_close(outcome.parameters, expected)


@thorough
def test_planned_orders_follow_a_slow_device(ranks: RankPools) -> None:
    arguments = [[0, 2], [1, 3]], (1.0, 1.0, 1.0, 3.0), "adamw", SLOW_FROM, {"gradient_clip_val": 0.3}
    expected = alone(options=arguments[-1])
    for outcome in ranks.run(4, drift, *arguments, steady_and_planned, timeout_s=90):
        stages = [plan.replicas[1].stages for plan in (outcome.first, *outcome.plans)]
        assert {one.ranks for one in stages} == {(0, 1, 0)}
        held = [len(one.layers_of(1)) for one in stages]
        assert min(held) < held[0] == held[-1]
        assert not outcome.warnings
        assert_close(outcome.parameters, expected)


@thorough
def test_what_was_measured_wrongly_is_put_right(ranks: RankPools) -> None:
    for outcome in ranks.run(2, drift, 2, (1.0, 2.0), "sgd", 0, timeout_s=90):
        assert outcome.first.samples(SAMPLES) == (6, 6)
        (step, plan), *_ = outcome.changes
        assert step < SLOW_UNTIL
        assert plan.samples(SAMPLES) == (8, 4)
        assert "of the samples in replicas 0 and 1 from training step" in outcome.lines[0]
        assert_close(outcome.parameters, alone("sgd"))
