"""Trainings in which replicas of pipelines train one model, and the same in this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from stage_trainings import scripted
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError, MetricCollection
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.balance.pipeline.orders import search
from lightning_hetero.balance.pipeline.replicas.orders.group_orders import GroupOrder
from lightning_hetero.balance.pipeline.replicas.orders.group_planner import GroupPlanner
from lightning_hetero.balance.pipeline.replicas.orders.ordered_solver import OrderedReplicas
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.solver import solve_replicas
from lightning_hetero.balance.pipeline.simulation import order_step_s
from lightning_hetero.balance.pipeline.stages import LayerCosts
from lightning_hetero.plugin.pipeline.replicas import planning

FEATURES = 6


@dataclass(frozen=True)
class Case:
    """How a model is divided and trained."""

    groups: tuple[tuple[int, ...], ...]  # or of as many ranks, if `replicas` is given
    speeds: tuple[float, ...] | None = None
    micro_batches: int = 2
    schedule: str = "1f1b"
    samples: int = 30
    batch_size: int = 8
    layers: int = 5
    tied: tuple[int, int] | None = None
    optimizer: str = "adamw"
    terms: bool = False
    epochs: int = 2
    shuffle: bool = True
    replicas: Any = None
    normalised: bool = False
    verbose: bool = False
    way: str | None = None  # in which replicas are run whatever is predicted, with a schedule that is planned
    constant: bool = False  # whether a layer has a buffer
    plans: tuple[Any, ...] = ()  # on which rank 0 decides, one after each of the first measured steps
    fits: int = 1
    trainer: tuple[tuple[str, Any], ...] = ()

    @property
    def world_size(self) -> int:
        return sum(map(len, self.groups))


class Shifted(nn.Linear):
    """Adds a constant that is saved with the model."""

    def __init__(self) -> None:
        super().__init__(FEATURES, FEATURES)
        self.constant: Tensor
        self.register_buffer("constant", torch.rand(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.constant


class Deep(LightningModule):
    """Layers of which two may share their weights, one is frozen and one is not always used; values in no layer."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers: list[nn.Module] = [
            nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()) if number % 2 else nn.Linear(FEATURES, FEATURES)
            for number in range(case.layers)
        ]
        if case.tied is not None:
            layers[case.tied[1]] = layers[case.tied[0]]
        if case.constant:
            layers[1] = Shifted()
        layers[-2].requires_grad_(False)
        if case.normalised:
            layers.append(nn.BatchNorm1d(FEATURES))
        self.model = nn.Sequential(*layers).double()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.shift: Tensor
        self.register_buffer("shift", torch.rand(FEATURES, dtype=torch.float64))
        self.case = case
        self.norms: list[float] = []
        self.error, self.mean = MeanAbsoluteError(), MeanMetric()
        self.several = MetricCollection({"rms": MeanSquaredError(squared=False), "mae": MeanAbsoluteError()})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, weight = batch
        found = self.model(x + self.shift) * self.scale
        squares = (found - x.sin()).square().mean(1)
        loss = (squares * weight).sum() / weight.sum() if self.case.terms else squares.mean()
        self.error(found[:, 0], x[:, 0])
        self.mean.update(squares.detach(), weight)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("largest", squares.max(), reduce_fx="max", on_step=False, on_epoch=True)
        self.log_dict(self.several(found[:, 1].detach(), x[:, 1]), on_step=True, on_epoch=False)
        return {"loss": loss, "found": found}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(norms).norm()))

    def on_train_epoch_end(self) -> None:
        self.log("called", self.model(torch.stack([self.shift, -self.shift])).sum())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        self.log("val_loss", (self.model(x + self.shift) * self.scale - x.sin()).square().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        found: Tensor = self.model(batch[0] + self.shift) * self.scale
        return found

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.case.optimizer == "sgd":
            found: Any = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.01)
        else:
            groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2], "lr": 0.005}]
            found = torch.optim.AdamW(groups, 0.01)
        schedule = torch.optim.lr_scheduler.StepLR(found, 3)
        return {"optimizer": found, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def weight_of(batch: Any) -> float:
    return float(batch[1].sum())


class Seen(Callback):
    """Keeps what callbacks are told after each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.found.append(outputs["found"].detach().cpu())


@dataclass(frozen=True)
class Outcome:
    """What a training did, as seen on one rank."""

    losses: list[float]
    found: list[Tensor]
    metrics: dict[str, float]
    parameters: dict[str, Tensor]
    predictions: list[Tensor]
    norms: list[float]
    plan: Any = None
    changes: tuple[Any, ...] = ()
    warnings: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()


def loader_of(case: Case, samples: int | None = None, *, shuffle: bool = True) -> Any:
    generator = torch.Generator().manual_seed(1)
    size = case.samples if samples is None else samples
    x = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64)
    weights = torch.randint(0, 4, (size,), generator=generator).double() + 0.5
    return DataLoader(TensorDataset(x, weights), case.batch_size, shuffle=shuffle)


def with_shares(shares: Sequence[float], plan: ReplicaPlan) -> ReplicaPlan:
    """Return a plan with other shares."""
    pairs = zip(plan.replicas, shares, strict=True)
    return ReplicaPlan(tuple(replace(replica, share=float(share)) for replica, share in pairs))


def planned(way: str, problem: ReplicaProblem, *, always_v: bool) -> OrderedReplicas:
    """Plan the orders of replicas in a way, where there can be such an order; see ``solve_ordered_replicas``."""
    # what such short passes take is noise
    generator = Random(problem.samples)
    speeds = [generator.choice([1.0, 2.0, 3.0]) for _ in range(problem.world_size)]
    costs = LayerCosts.of_speeds([(1.0, 1.0)] * problem.num_layers, speeds)
    halves = tuple(tuple(s / 2 for s in row) for row in costs.backward_s)
    problem = replace(problem, costs=replace(costs, input_s=halves, weight_s=halves), overheads=None)
    solution = solve_replicas(problem)
    groups = []
    with mock.patch.object(search, "with_whole_passes", lambda order, *times: (order, order_step_s(order, *times))):
        for replica, samples in zip(solution.plan.replicas, solution.samples, strict=True):
            first = GroupOrder(replica.ranks, replica.stages)
            groups.append([*GroupPlanner(problem).ways(first, samples, 2_000, names=[way], always=True), first][0])
    assert any(one.name == way for one in groups)
    for one in groups:
        kinds = {action.kind for actions in one.order.actions for action in actions} if one.order is not None else set()
        assert ("weight" in kinds) == ("split" in one.name)
    plan = ReplicaPlan(tuple(one.replica(n) for one, n in zip(groups, solution.samples, strict=True)))
    orders, names = tuple(one.order for one in groups), tuple(one.name for one in groups)
    return OrderedReplicas(replace(solution, plan=plan), orders, names, "")


def train(case: Case, resume: str | None = None, save: str | None = None) -> Outcome:
    """Train on the ranks of the harness, or in this process."""
    seen = Seen()
    options: dict[str, Any] = {"max_epochs": case.epochs, "limit_val_batches": None, **dict(case.trainer)}
    strategy: Any = None
    if "LOCAL_RANK" in os.environ:
        strategy = HeteroPipelineStrategy(
            replicas=case.replicas or [list(ranks) for ranks in case.groups],
            speeds=None if case.speeds is None else list(case.speeds),
            num_microbatches=case.micro_batches,
            schedule=case.schedule,  # type: ignore[arg-type]
            num_loss_terms=weight_of if case.terms else None,
            verbose=case.verbose,
            watch_steps=1 if case.plans else 10,
        )
        trainer = make_trainer(strategy, dist.get_world_size(), [seen], **options)
        torch.manual_seed(17 if dist.get_rank() == 0 else 5)  # only rank 0's random numbers decide
    else:
        trainer = Trainer(
            accelerator="cpu", devices=1, callbacks=[seen], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options
        )  # fmt: skip
    model = Deep(case)
    torch.manual_seed(11)
    warned: list[str] = []
    with (
        nullcontext()
        if case.way is None
        else mock.patch.object(planning, "solve_ordered_replicas", partial(planned, case.way)),
        scripted(case.plans),
        mock.patch("lightning_hetero.plugin.pipeline.watching.watcher.rank_zero_warn", warned.append),
    ):
        for number in range(case.fits):
            trainer.fit_loop.max_epochs = case.epochs * (number + 1)
            trainer.fit(model, loader_of(case, shuffle=case.shuffle), loader_of(case, 11), ckpt_path=resume)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if save is not None:
        trainer.save_checkpoint(save)
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    predictions: list[Any] = trainer.predict(model, loader_of(case, 2 * case.batch_size + 3, shuffle=False)) or []
    plan = None if strategy is None else strategy.replica_plan
    changes: tuple[Any, ...] = ()
    found: Any = None
    if strategy is not None:
        changes, found = tuple((change.step, change.plan) for change in strategy.changes), strategy.replica_findings
    if changes:
        assert found.plan == found.solution.plan == plan
    ways = () if found is None or found.ordered is None else found.ordered.names
    return Outcome(
        seen.losses, seen.found, metrics, parameters, predictions, model.norms, plan, changes, tuple(warned), ways
    )


def largest_difference(found: Outcome, expected: Outcome) -> float:
    """Return the largest difference of two trainings in anything that they found."""
    assert len(found.losses) == len(expected.losses)
    assert list(found.parameters) == list(expected.parameters)
    assert found.metrics.keys() == expected.metrics.keys()
    pairs = [
        (torch.tensor(found.losses, dtype=torch.float64), torch.tensor(expected.losses, dtype=torch.float64)),
        (torch.tensor(found.norms, dtype=torch.float64), torch.tensor(expected.norms, dtype=torch.float64)),
        *zip(found.found, expected.found, strict=True),
        *((found.parameters[name], expected.parameters[name]) for name in expected.parameters),
        *zip(found.predictions, expected.predictions, strict=True),
    ]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())
