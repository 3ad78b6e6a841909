"""Devices become slower and faster, and layers move where they can."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from profiles import thorough
from stage_trainings import TWO, Averaged, Deep, Outcome, alone, data, known_times, train
from training import assert_close, flat, make_trainer

from lightning_hetero import HeteroPipelineStrategy, PipelineRecorder
from lightning_hetero.balance.pipeline import stage_rebalancer
from lightning_hetero.balance.pipeline.orders.choice import PipelineChoice
from lightning_hetero.balance.pipeline.orders.order import known_order
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, plan_order, v_shapes
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.stage_watch import StageWatch
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.distributed.pipeline.layer_profile import LayerProfile
from lightning_hetero.plugin.pipeline import planning
from lightning_hetero.plugin.pipeline.runtime import Runtime
from lightning_hetero.testing import SlowLayers

# ---- what cannot move ------------------------------------------------------------------------------------------------


class Shared(torch.optim.SGD):
    """Counts steps for all parameters together."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        own = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        count = self.state[own[0]].get("count", torch.zeros(()))
        count += 1
        for parameter in own:
            self.state[parameter]["count"] = count
        return loss


class Weak(torch.optim.SGD):
    """Lets something else know its parameters, as compiled layers do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        HELD.extend(weakref.ref(p) for group in self.param_groups for p in group["params"])
        return loss


class Hooked(torch.optim.SGD):
    """Looks at gradients by itself."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        every = [p for group in self.param_groups for p in group["params"]]
        HELD.extend(p.register_hook(lambda gradient: gradient) for p in every if not p._backward_hooks)
        return loss


class Tricky(Deep):
    """Keeps its layers where they are for the reason that its optimiser's name says."""

    def configure_optimizers(self) -> Any:
        kinds: Any = {"averages": Averaged, "shared": Shared, "weak": Weak, "hook": Hooked}
        kind = kinds.get(self.optimizer, torch.optim.SGD)
        return kind([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and self.optimizer == "attribute":
            for layer in self.model:
                vars(layer)[3 * chr(113)] = (line for line in "abc")  # by a name that no code has

    def on_train_end(self) -> None:
        HELD.clear()


HELD: list[Any] = []
OBSTACLES = {
    "averages": "Averaged keeps tensors in 'averages'",
    "shared": "Shared keeps one tensor for several parameters",
    "hook": "has a hook on its gradient",
    "weak": "something keeps a weak reference to 'model.",
    "attribute": ".qqq` cannot be sent",
}


def all_obstacles() -> dict[str, Outcome]:
    return {name: train(TWO[:2], name, 8, module_of=Tricky) for name in OBSTACLES}


def test_what_cannot_move_stays_and_is_named_once(ranks: RankPools) -> None:
    expected = {name: flat(alone(name, 8, module_of=Tricky)) for name in OBSTACLES}
    for outcomes in ranks.run(2, all_obstacles):
        for name, outcome in outcomes.items():
            assert not outcome.changes, name
            (warning,) = outcome.warnings
            assert OBSTACLES[name] in warning
            # the first stages that are asked for, or the second ones if those were found before
            assert any(f"{layers} layers per rank would be faster" in warning for layers in ([9, 3], [2, 10]))
            assert_close(outcome.parameters, expected[name])


# ---- devices that change ---------------------------------------------------------------------------------------------


@dataclass
class Drifted:
    """What a rank has seen of a training with devices that change."""

    first: StagePlan
    changes: list[tuple[int, Any]]
    lines: list[str]
    parameters: list[float]


def choose_shared(problem: OrderProblem, *, always_v: bool) -> PipelineChoice:
    """Choose a V with backward passes in two parts and shared layers, whatever is predicted."""
    assert problem.split
    assert problem.shared
    problem = replace(problem, most_held=4)
    plan = plan_order(problem, v_shapes(problem.costs, problem.last_rank), effort=8_000)
    assert plan is not None
    other = plan_pipeline(problem.costs, problem.micro_batches, "1f1b", problem.transfer_s)
    return PipelineChoice("shared split v", plan.stages, plan.order, plan.step_s, "", other)


def steady(measured: LayerProfile) -> LayerProfile:
    """Return the times of equal layers, whatever else ran on this machine when they were measured."""
    split = [seconds > 0 for seconds in measured.weight_s]
    return replace(
        measured,
        forward_s=(0.001,) * len(split),
        backward_s=(0.002,) * len(split),
        input_s=tuple(0.001 if is_split else 0.002 for is_split in split),
        weight_s=tuple(0.001 if is_split else 0.0 for is_split in split),
        transfer_s=0.00001,
    )


def drift(folder: str, moving_s: float, *, planned: bool = False, delay: float = 1.0, slower: float = 3.0) -> Drifted:
    world_size = dist.get_world_size()
    strategy = HeteroPipelineStrategy(num_microbatches=4, schedule="auto" if planned else "1f1b")
    recorder = PipelineRecorder(step=5, record=folder)
    slow = SlowLayers([1.0] * world_size, seconds_per_sample=0.0001)
    trainer = make_trainer(strategy, world_size, [slow, recorder], max_steps=110)
    module, lines = Deep(), []

    def factors() -> list[float]:
        changed = 30 <= trainer.fit_loop.total_batch_idx < 70
        return [1.0] * (world_size - 1) + [slower if changed else 1.0]

    where = "lightning_hetero.plugin.pipeline.watching.watcher.say"
    said = mock.patch(where, lambda _, message: lines.append(message))
    moving = mock.patch.object(stage_rebalancer, "moving_s", return_value=moving_s)
    plans: list[StagePlan] = []
    ended = StageWatch.step_ended

    def note(watch: StageWatch[Any]) -> None:
        plans.append(watch.plan)
        ended(watch)

    begun = mock.patch.object(StageWatch, "step_ended", note)
    chosen = mock.patch.object(planning, "choose_order", choose_shared)
    profile = LayerProfile.from_numbers
    times = mock.patch.object(LayerProfile, "from_numbers", lambda numbers: steady(profile(numbers)))
    with said, moving, begun, known_times(factors, delay), chosen, times if planned else nullcontext():
        trainer.fit(module, data(40))
    assert strategy.findings is not None
    assert strategy.findings.plan == strategy.plan == plans[-1]
    changes = [(change.step, change.plan) for change in strategy.changes]
    return Drifted(plans[0], changes, lines, flat(module))


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=thorough)])
def test_a_slow_device_gets_fewer_layers_until_it_has_recovered(
    ranks: RankPools, tmp_path: Path, world_size: int
) -> None:
    expected = flat(alone("adamw", 110))
    for outcome in ranks.run(world_size, drift, str(tmp_path), 0.0):
        (slowed, relieved), *_, (recovered, last) = outcome.changes
        assert slowed <= 60
        assert recovered <= 100
        assert relieved.layers_of_ranks[-1] < outcome.first.layers_of_ranks[-1] == last.layers_of_ranks[-1]
        assert f"rank {world_size - 1} takes 3.00 times as long as before" in outcome.lines[0]
        assert f"layers per rank from training step {slowed} on" in outcome.lines[0]
        assert_close(outcome.parameters, expected)
    record = parse_record((tmp_path / "hetero_run.jsonl").read_text().splitlines())
    assert record.stages is not None
    held = [StagePlan(stages.ranks, stages.ends) for stages in (*record.earlier_stages, record.stages)]
    assert held == [outcome.first, *(plan for _, plan in outcome.changes)]
    assert "layers have moved before step" in record.stages.sentences[0]


def drift_in_order(folder: str, **options: Any) -> tuple[Drifted, list[Any]]:
    """Return also the orders that the rank was told to run."""
    used: list[Any] = []
    reorder = Runtime.reorder

    def note(runtime: Runtime, schedule: Any, split_layers: Any) -> None:
        used.append(schedule)
        reorder(runtime, schedule, split_layers)

    with mock.patch.object(Runtime, "reorder", note):
        return drift(folder, 0.0, planned=True, **options), used


def test_stages_in_a_planned_order_follow_devices_with_a_new_order(ranks: RankPools, tmp_path: Path) -> None:
    expected = flat(alone("adamw", 110))
    found = ranks.run(2, drift_in_order, str(tmp_path))
    for outcome, used in found:
        (slowed, relieved), *_ = outcome.changes
        assert slowed <= 60
        assert work_of(relieved)[-1] < work_of(outcome.first)[-1]
        assert relieved.ranks == outcome.first.ranks == (0, 1, 0)
        assert "rank 1 takes 3.00 times as long as before" in outcome.lines[0]
        assert_close(outcome.parameters, expected)
        assert used == found[0][1], "all ranks run the same orders"
        assert len(used) == 1 + len(outcome.changes)
    assert any(plan.shared for _, plan in (*found[0][0].changes, (0, found[0][0].first)))


def test_a_planned_order_with_longer_steps_than_predicted_is_left(ranks: RankPools, tmp_path: Path) -> None:
    expected = flat(alone("adamw", 110))
    for outcome, (first, *then) in ranks.run(2, partial(drift_in_order, str(tmp_path), delay=1.6, slower=1.0)):
        ((step, plan),) = outcome.changes
        assert step <= 40
        assert outcome.first.ranks == first.ranks == (0, 1, 0)
        assert then == [known_order(plan.ranks, 4, "1f1b")]
        assert plan.ranks == (1, 0)
        assert 'layers per rank and schedule "1f1b" from training step' in outcome.lines[0]
        assert "(steps take 1.60 times as long as predicted; predicted: 1." in outcome.lines[0]
        assert_close(outcome.parameters, expected)
    record = parse_record((tmp_path / "hetero_run.jsonl").read_text().splitlines())
    assert record.stages is not None
    assert record.stages.ranks == (1, 0)


def work_of(plan: StagePlan) -> list[int]:
    """Return how many layers each rank runs in four micro-batches."""
    runs = [sum(len(plan.layers(stage, i)) for i in range(4)) for stage in range(plan.num_stages)]
    return [sum(runs[stage] for stage in plan.stages_of(rank)) for rank in range(plan.world_size)]


def test_a_layer_with_a_hook_is_not_shared_later() -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(4)]
    runtime: Any = SimpleNamespace(found=SimpleNamespace(layers=layers))
    plan = StagePlan((0, 1), (2, 4), ((1,),))
    assert Runtime._hook_on_shared(runtime, plan) is None
    layers[1].register_forward_hook(lambda *_: None)
    assert Runtime._hook_on_shared(runtime, plan) is None
    layers[2].register_forward_hook(lambda *_: None)
    assert "share layer 2, on which the hook" in str(Runtime._hook_on_shared(runtime, plan))


@thorough  # the rule itself is tested without ranks
def test_a_move_that_does_not_pay_is_only_advised(ranks: RankPools, tmp_path: Path) -> None:
    for outcome in ranks.run(2, drift, str(tmp_path), 1000.0):
        assert not outcome.changes
        (line,) = outcome.lines
        assert "layers per rank would be faster (rank 1 takes 3.00 times as long as before" in line
        assert "but moving them is predicted to take 1e+03 s, more than it saves in the" in line
