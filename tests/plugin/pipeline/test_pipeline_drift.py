"""Devices become slower and faster, and layers move where they can."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from profiles import thorough
from stage_trainings import TWO, Deep, Outcome, alone, data, train
from training import assert_close, flat, make_trainer

from lightning_hetero import HeteroPipelineStrategy, PipelineRecorder
from lightning_hetero.balance.pipeline import stage_rebalancer
from lightning_hetero.balance.pipeline.stage_watch import StageWatch
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.balance.types import StepTiming, WindowTiming
from lightning_hetero.testing import SlowLayers

# ---- what cannot move ------------------------------------------------------------------------------------------------


class Averaged(torch.optim.SGD):
    """Keeps averages beside the states of parameters."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        own = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.averages = [p.detach().clone() for p in own]
        return loss


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
            assert "[9, 3] layers per rank would be faster" in warning
            assert_close(outcome.parameters, expected[name])


# ---- devices that change ---------------------------------------------------------------------------------------------


@contextmanager
def known_times(factors: Callable[[], list[float]]) -> Iterator[None]:
    """Have ranks measure what was predicted times ``factors()``, whatever else runs on this machine."""

    def summary(watch: StageWatch, timings: Sequence[StepTiming]) -> WindowTiming:
        rank = dist.get_rank()
        own_s = watch._problem.own_s(watch.plan)[rank] * factors()[rank]
        return WindowTiming(timings[-1].samples, len(timings), own_s, own_s / 100)

    often = mock.patch.object(stage_rebalancer, "steps_between_windows", return_value=0)
    with mock.patch.object(StageWatch, "summary", summary), often:
        yield


@dataclass
class Drifted:
    """What a rank has seen of a training with devices that change."""

    first: StagePlan
    changes: list[tuple[int, StagePlan]]
    lines: list[str]
    parameters: list[float]


def drift(folder: str, moving_s: float) -> Drifted:
    world_size = dist.get_world_size()
    strategy = HeteroPipelineStrategy(num_microbatches=4)
    recorder = PipelineRecorder(step=5, record=folder)
    slow = SlowLayers([1.0] * world_size, seconds_per_sample=0.0001)
    trainer = make_trainer(strategy, world_size, [slow, recorder], max_steps=110)
    module, lines = Deep(), []

    def factors() -> list[float]:
        changed = 30 <= trainer.fit_loop.total_batch_idx < 70
        return [1.0] * (world_size - 1) + [3.0 if changed else 1.0]

    where = "lightning_hetero.plugin.pipeline.watching.watcher.say"
    said = mock.patch(where, lambda _, message: lines.append(message))
    moving = mock.patch.object(stage_rebalancer, "moving_s", return_value=moving_s)
    plans: list[StagePlan] = []
    ended = StageWatch.step_ended

    def note(watch: StageWatch) -> None:
        plans.append(watch.plan)
        ended(watch)

    begun = mock.patch.object(StageWatch, "step_ended", note)
    with said, moving, begun, known_times(factors):
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


@thorough  # the rule itself is tested without ranks
def test_a_move_that_does_not_pay_is_only_advised(ranks: RankPools, tmp_path: Path) -> None:
    for outcome in ranks.run(2, drift, str(tmp_path), 1000.0):
        assert not outcome.changes
        (line,) = outcome.lines
        assert "layers per rank would be faster (rank 1 takes 3.00 times as long as before" in line
        assert "but moving them is predicted to take 1e+03 s, more than it saves in the" in line
