"""Trainings in which layers of a pipeline move after steps that a test names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import SaveAt, flat, make_trainer

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.balance.pipeline import stage_rebalancer
from lightning_hetero.balance.pipeline.orders.choice import PipelineChoice
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, plan_order
from lightning_hetero.balance.pipeline.stage_rebalancer import StageDecision
from lightning_hetero.balance.pipeline.stage_watch import StageWatch
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.balance.tuning.rebalancer import Window
from lightning_hetero.balance.types import StepTiming, WindowTiming

FEATURES, BATCH_SIZE = 6, 8


class Normal(nn.Module):
    """Replaces a buffer whenever it runs, and counts in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = torch.full_like(self.mean, 0.25)
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

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        named = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            found: Any = torch.optim.SGD(named, lr=0.05, momentum=0.9, nesterov=True)
        else:
            groups = [{"params": named[::2], "weight_decay": 0.1}, {"params": named[1::2], "lr": 0.005}]
            found = torch.optim.AdamW(groups, 0.01, amsgrad=True)
        schedule = torch.optim.lr_scheduler.StepLR(found, 3)
        return {"optimizer": found, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Averaged(torch.optim.SGD):
    """Keeps averages beside the states of parameters."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        own = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.averages = [p.detach().clone() for p in own]
        return loss


class Stack(nn.Module):
    """Blocks that nobody has named as layers, and a parameter between them that belongs to none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()) for _ in range(6))
        self.shift = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x + self.shift)
        return x


class Found(Deep):
    """A model whose layers are found."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        self.model: Any = Stack().double()


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


def scripted(plans: Sequence[Any]) -> Any:
    """Return a context in which rank zero decides on these plans, one after the other, after one measured step each."""
    left = list(plans)

    def decide(watch: StageWatch[Any], reports: Any) -> StageDecision[Any]:
        assert any(report.window.own_s > 0 for report in reports)
        plan = left.pop(0) if left else watch.plan
        plan = plan(watch.plan) if callable(plan) else plan
        return StageDecision(plan, True, 0.5, 0.1, (1.0,) * plan.world_size, Window(0, 1))

    return mock.patch.object(StageWatch, "decide", decide)


@contextmanager
def known_times(factors: Callable[[], list[float]], delay: float = 1.0) -> Iterator[None]:
    """Have ranks measure what was predicted times ``factors()``, whatever else runs on this machine.

    Steps in an order of their own take ``delay`` times as long as predicted.
    """

    def summary(watch: StageWatch[Any], timings: Sequence[StepTiming]) -> WindowTiming:
        rank, problem = dist.get_rank(), watch._problem
        last = ([timing for timing in timings if timing.samples == problem.samples] or timings)[-1]
        size = last.samples
        own_s = problem.own_s(watch.plan, size)[rank] * factors()[rank]
        step_s = problem.step_s(watch.plan, factors()) * (1.0 if problem.way_of(watch.plan) == "1f1b" else delay)
        assert last.waiting_s > 0 or not last.own_s, "ranks of a pipeline wait for each other"
        return WindowTiming(size, len(timings), own_s, own_s / 100, max(step_s - own_s, 0.0))

    often = mock.patch.object(stage_rebalancer, "steps_between_windows", return_value=0)
    with mock.patch.object(StageWatch, "summary", summary), often:
        yield


@dataclass
class Outcome:
    """What a rank has seen."""

    parameters: list[float]
    changes: list[tuple[int, Any]]
    calls: int
    norms: list[float]
    warnings: list[str]
    metrics: dict[str, float]


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
    strategy = HeteroPipelineStrategy(num_microbatches=4, schedule="1f1b", watch_steps=1, verbose=False)
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
        trainer.fit(module, data(40), data(2), ckpt_path=resume)
    changes = [(change.step, change.plan) for change in strategy.changes]
    layer: Any = None if isinstance(module, Found) else module.model[4]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Outcome(flat(module), changes, getattr(layer, "calls", 0), module.norms, warned, metrics)


def alone(
    optimizer: str = "adamw", steps: int = 30, options: dict[str, Any] | None = None, module_of: Any = Deep
) -> Deep:
    module: Deep = module_of(optimizer)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Moments()], **(options or {}),
    )  # fmt: skip
    trainer.fit(module, data(40), data(2))
    return module


TWO = [StagePlan((1, 0), ends) for ends in ((3, 12), (10, 12), (5, 12), (1, 12), (8, 12))]
THREE = [StagePlan((1, 2, 0), ends) for ends in ((1, 2, 12), (5, 10, 12), (3, 4, 12), (2, 9, 12), (4, 8, 12))]
VALIDATED: dict[str, Any] = {"val_check_interval": 4, "limit_val_batches": None}
OPTIONS: dict[str, Any] = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
FOUND = [StagePlan((1, 0), ends) for ends in ((2, 7), (6, 7), (3, 7))]


def always_shared(shapes_of: Any, problem: OrderProblem, *, always_v: bool) -> PipelineChoice:
    """Choose an order with shared layers, also where backward passes cannot be split."""
    assert problem.shared, "layers were found that can be shared"
    speeds = [1.0 + (rank == problem.last_rank) for rank in range(problem.costs.world_size)]
    costs = LayerCosts.of_speeds([(1.0, 2.0)] * problem.costs.num_layers, speeds)
    costs = replace(costs, input_s=costs.forward_s, weight_s=costs.forward_s)
    plan = plan_order(replace(problem, costs=costs), shapes_of(costs, problem.last_rank))
    assert plan is not None
    assert plan.stages.shared
    return PipelineChoice("shared split", plan.stages, plan.order, plan.step_s, "")
