"""Layers move between steps, and the training remains that of one device."""

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
from lightning.pytorch import Callback, LightningModule, Trainer
from profiles import thorough
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import SaveAt, assert_close, flat, make_trainer

from lightning_hetero import HeteroPipelineStrategy, PipelineRecorder
from lightning_hetero.balance.pipeline import stage_rebalancer
from lightning_hetero.balance.pipeline.stage_rebalancer import StageDecision
from lightning_hetero.balance.pipeline.stage_watch import StageWatch
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.balance.tuning.rebalancer import Window
from lightning_hetero.balance.types import StepTiming, WindowTiming
from lightning_hetero.testing import SlowLayers

FEATURES, BATCH_SIZE = 6, 8


class Normal(nn.Module):
    """Keeps a running mean by replacing a buffer, and counts in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        shifted: Tensor = self.linear(x).tanh() + self.mean
        return shifted


class Deep(LightningModule):
    """Twelve layers, of which two share their weights and one is frozen, and a value that only the loss uses."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        torch.manual_seed(3)
        layers: list[nn.Module] = [nn.Linear(FEATURES, FEATURES) for _ in range(12)]
        layers[3], layers[4], layers[9] = nn.Tanh(), Normal(), layers[2]
        layers[6].requires_grad_(False)
        self.model = nn.Sequential(*layers).double()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.optimizer = optimizer
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        loss: Tensor = (self.scale * self.model(x) - x).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        named = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            found: Any = torch.optim.SGD(named, lr=0.05, momentum=0.9, nesterov=True)
        else:
            groups = [{"params": named[::2], "weight_decay": 0.1}, {"params": named[1::2], "lr": 0.005}]
            found = torch.optim.AdamW(groups, 0.01, amsgrad=True)
        schedule = torch.optim.lr_scheduler.StepLR(found, 3)
        return {"optimizer": found, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Moments(Callback):
    """Looks at gradients that remain from the step before, where the next begins."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        norms = [p.grad.norm() ** 2 for p in pl_module.parameters() if p.grad is not None]
        assert isinstance(pl_module, Deep)
        pl_module.norms.append(float(sum(norms, torch.zeros(()))))


def data(steps: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(BATCH_SIZE * steps, FEATURES, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(samples), BATCH_SIZE)


def scripted(plans: Sequence[StagePlan]) -> Any:
    """Return a context in which rank zero decides on these plans, one after the other, after one measured step each."""
    left = list(plans)

    def decide(watch: StageWatch, reports: Any) -> StageDecision:
        assert all(report.window.own_s > 0 for report in reports)
        plan = left.pop(0) if left else watch.plan
        return StageDecision(plan, True, 0.5, 0.1, (1.0,) * plan.num_stages, Window(0, 1))

    return mock.patch.object(StageWatch, "decide", decide)


@dataclass
class Outcome:
    """What a rank has seen."""

    parameters: list[float]
    changes: list[tuple[int, StagePlan]]
    calls: int
    norms: list[float]
    warnings: list[str]


def train(
    plans: Sequence[StagePlan],
    optimizer: str = "adamw",
    steps: int = 30,
    options: dict[str, Any] | None = None,
    save: tuple[int, Path] | None = None,
    resume: Path | None = None,
    module_of: Callable[[str], Deep] = Deep,
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    module = module_of(optimizer)
    strategy = HeteroPipelineStrategy(num_microbatches=4, watch_steps=1, verbose=False)
    saving = [] if save is None else [SaveAt(*save)]
    trainer = make_trainer(
        strategy,
        dist.get_world_size(),
        [*([Moments()] if module_of is Deep else []), *callbacks, *saving],
        max_steps=steps,
        **(options or {}),
    )
    warned: list[str] = []
    with scripted(plans), mock.patch("lightning_hetero.plugin.pipeline.watching.watcher.rank_zero_warn", warned.append):
        trainer.fit(module, data(40), ckpt_path=resume)
    changes = [(change.step, change.plan) for change in strategy.changes]
    layer: Any = module.model[4]
    return Outcome(flat(module), changes, layer.calls, module.norms, warned)


def alone(
    optimizer: str = "adamw", steps: int = 30, options: dict[str, Any] | None = None, module_of: Any = Deep
) -> Deep:
    module: Deep = module_of(optimizer)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Moments()], **(options or {}),
    )  # fmt: skip
    trainer.fit(module, data(40))
    return module


TWO = [StagePlan((1, 0), ends) for ends in ((3, 12), (10, 12), (5, 12), (1, 12), (8, 12))]
THREE = [StagePlan((1, 2, 0), ends) for ends in ((1, 2, 12), (5, 10, 12), (3, 4, 12), (2, 9, 12), (4, 8, 12))]
OPTIONS: dict[str, Any] = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}


@pytest.mark.parametrize(
    ("plans", "optimizer", "options"),
    [
        (TWO, "adamw", {}),
        (THREE, "sgd", OPTIONS),
        pytest.param(TWO, "sgd", OPTIONS, marks=thorough),
        pytest.param(THREE, "adamw", OPTIONS, marks=thorough),
        pytest.param(THREE, "adamw", {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, marks=thorough),
    ],
)
def test_parameters_are_those_of_one_device(
    ranks: RankPools, plans: list[StagePlan], optimizer: str, options: dict[str, Any]
) -> None:
    """With tied and frozen layers, counts in a layer, and hooks that look at what earlier steps have left."""
    expected = alone(optimizer, 15, options)
    for outcome in ranks.run(plans[0].num_stages, train, plans, optimizer, 15, options):
        assert_close(outcome.parameters, flat(expected))
        assert [plan for _, plan in outcome.changes] == plans
        every = options.get("accumulate_grad_batches", 1)
        assert all(step % every == 0 for step, _ in outcome.changes)
        assert_close(outcome.norms, expected.norms)
        assert outcome.calls >= 4 * 15 * every  # on whichever ranks the layer was
        assert not outcome.warnings


def test_a_checkpoint_after_a_move_is_that_of_one_device(ranks: RankPools, tmp_path: Path) -> None:
    path = tmp_path / "moved.ckpt"
    ranks.run(2, train, TWO[:3], "adamw", 12, {}, (10, path))
    saved = torch.load(path, weights_only=False)
    before = alone("adamw", 11)
    module = Deep()
    module.load_state_dict(saved["state_dict"])
    assert_close(flat(module), flat(before))
    (optimizer,) = [module.configure_optimizers()["optimizer"]]
    optimizer.load_state_dict(saved["optimizer_states"][0])
    expected: Any = before.optimizers()
    for own, other in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert own.keys() == other.keys()
        assert all(torch.allclose(own[name], other[name], rtol=0, atol=1e-10) for name in own)
    parameters = flat(alone("adamw", 30))
    for outcome in ranks.run(3, train, THREE[:2], "adamw", 30, {}, None, path):
        assert_close(outcome.parameters, parameters)
        assert len(outcome.changes) == 2


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
        HELD.extend(p.register_hook(lambda gradient: gradient) for p in every if len(HELD) < len(every))
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
                vars(layer)[chr(120)] = (line for line in "abc")  # by a name that no code has

    def on_train_end(self) -> None:
        HELD.clear()


HELD: list[Any] = []
OBSTACLES = {
    "averages": "Averaged keeps tensors in 'averages'",
    "shared": "Shared keeps one tensor for several parameters",
    "hook": "has a hook on its gradient",
    "weak": "something keeps a weak reference to 'model.",
    "attribute": ".x` cannot be sent",
}


def all_obstacles() -> dict[str, Outcome]:
    return {name: train(TWO[:2], name, 8, module_of=Tricky) for name in OBSTACLES}


def test_what_cannot_move_stays_and_is_named_once(ranks: RankPools) -> None:
    expected = {name: flat(alone(name, 8, module_of=Tricky)) for name in OBSTACLES}
    for outcomes in ranks.run(2, all_obstacles):
        for name, outcome in outcomes.items():
            assert not outcome.changes
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


def test_a_move_that_does_not_pay_is_only_advised(ranks: RankPools, tmp_path: Path) -> None:
    for outcome in ranks.run(2, drift, str(tmp_path), 1000.0):
        assert not outcome.changes
        (line,) = outcome.lines
        assert "layers per rank would be faster (rank 1 takes 3.00 times as long as before" in line
        assert "but moving them is predicted to take 1e+03 s, more than it saves in the" in line
