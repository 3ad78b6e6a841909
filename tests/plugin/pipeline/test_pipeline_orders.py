"""A rank with both ends of the model trains as one device does, holds what was planned, and resumes."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from profiles import thorough
from stage_trainings import always_shared
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy, PipelineRecorder
from lightning_hetero.balance.pipeline.orders.choice import PipelineChoice, choose_order
from lightning_hetero.balance.pipeline.orders.proof import most_held
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, plan_order, straight_shapes, v_shapes
from lightning_hetero.balance.pipeline.simulation import Timeline
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.command.report.page import build
from lightning_hetero.distributed.pipeline import layer_profile
from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError
from lightning_hetero.plugin.pipeline import planning
from lightning_hetero.testing import SlowLayers

LAYERS, FEATURES, BATCH_SIZE, SAMPLES = 9, 6, 8, 37  # the last batch has 5 samples


class Deep(LightningModule):
    """Layers with and without parameters, one of them tied, buffers, a metric, and evaluation on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        first = nn.Linear(FEATURES, FEATURES)
        self.model: Any = nn.Sequential(
            first, nn.Tanh(), nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES),
            nn.Tanh(), nn.Linear(FEATURES, FEATURES), Tied(first), nn.Linear(FEATURES, FEATURES),
        ).double()  # fmt: skip
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.error = MeanAbsoluteError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        y = self.scale * self.model(x)
        self.error(y, x)
        loss: Tensor = (y - x).square().mean()
        self.log("error", self.error, on_step=False, on_epoch=True)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        self.log("val_loss", (self.scale * self.model(x) - x).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Found(Deep):
    """A model that calls its layers itself, with something between them that every stage computes."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.TransformerEncoderLayer(FEATURES, 2, 8, 0.0, batch_first=True) for _ in range(7)]
        self.model = Blocks(
            nn.Linear(FEATURES, FEATURES), nn.ModuleList(blocks), nn.Linear(FEATURES, FEATURES)
        ).double()


class Blocks(nn.Module):
    """Attention with a mask."""

    def __init__(self, first: nn.Module, blocks: nn.ModuleList, last: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.last = first, blocks, last

    def forward(self, x: Tensor) -> Any:
        mask = torch.zeros(len(x), 3, dtype=torch.bool, device=x.device)
        mask[:, 0] = x[:, 0] > 0
        x = self.first(x)[:, None].expand(-1, 3, -1) * torch.arange(1, 4, device=x.device)[None, :, None]
        for block in self.blocks:
            x = block(x, src_key_padding_mask=mask)
        return self.last(x[:, 2])


class Tied(nn.Module):
    """Uses the weight of the first layer again, transposed."""

    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.first.weight.t()


@dataclass
class Outcome:
    """What a rank has seen."""

    parameters: dict[str, Tensor]
    metrics: dict[str, float]
    checkpoint: str
    plan: StagePlan | None = None
    choice: PipelineChoice | None = None
    timeline: Timeline | None = None
    watched: bool = False


def loader(size: int = SAMPLES) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(size, FEATURES, generator=generator, dtype=torch.float64)), BATCH_SIZE)


def fit(trainer: Trainer, module: LightningModule, resume: str | None) -> Outcome:
    trainer.fit(module, loader(), loader(16), ckpt_path=resume)
    trainer.validate(module, loader(12), verbose=False)
    trainer.fit_loop.max_epochs = (trainer.max_epochs or 0) + 1
    trainer.fit(module, loader(), loader(16))  # with the stages that were found
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    saving = next(c for c in trainer.callbacks if isinstance(c, ModelCheckpoint))  # type: ignore[attr-defined]
    parameters = {name: value.clone() for name, value in module.state_dict().items()}
    return Outcome(parameters, metrics, saving._last_checkpoint_saved)


def train(
    schedule: Any, factors: list[float], folder: str, resume: str | None, chosen: Any, kind: type[Deep],
    accumulated: int = 1, *callbacks: Callback,
) -> Outcome:  # fmt: skip
    """Train on this rank; with ``chosen``, the order that it returns is taken, whatever was predicted."""
    strategy = HeteroPipelineStrategy(num_microbatches=8, schedule=schedule, verbose=False)
    recorder = PipelineRecorder(step=2, record=folder)
    slow = SlowLayers(factors, seconds_per_sample=0.003)
    trainer = make_trainer(
        strategy, dist.get_world_size(), [slow, ModelCheckpoint(folder, save_top_k=-1), recorder, *callbacks],
        max_epochs=1, limit_val_batches=None, enable_checkpointing=True, gradient_clip_val=0.5,
        accumulate_grad_batches=accumulated,
    )  # fmt: skip
    module, step = kind(), torch.optim.AdamW.step

    def rough(self: Any, closure: Any) -> Any:
        """Step as a device does that rounds differently from rank 0."""
        loss = step(self, closure)
        runtime = strategy.runtime if self in trainer.optimizers else None  # another one is only tried out
        for copies in () if runtime is None else runtime.placement.copies:
            for parameter in copies.parameters if dist.get_rank() > copies.ranks[0] else ():
                parameter.data.mul_(1.01)
        return loss

    with (
        mock.patch.object(torch.optim.AdamW, "step", rough),
        mock.patch.object(planning, "choose_order", chosen) if chosen else nullcontext(),
    ):
        outcome = fit(trainer, module, resume)
    found = strategy.findings
    assert found is not None
    return replace(
        outcome, plan=strategy.plan, choice=found.choice, timeline=recorder.timeline,
        watched=strategy._watcher is not None,
    )  # fmt: skip


def always_split(shapes_of: Any, problem: OrderProblem, *, always_v: bool) -> PipelineChoice:
    """Choose an order that splits the backward passes of the layers that can be split."""
    half = tuple(tuple(s / 2 for s in row) for row in problem.costs.backward_s)
    assert problem.split, "layers were found that can be split"
    problem = replace(problem, costs=replace(problem.costs, input_s=half, weight_s=half))
    plan = plan_order(problem, shapes_of(problem.costs, problem.last_rank))
    assert plan is not None
    assert any(action.kind == "weight" for actions in plan.order.actions for action in actions)
    return PipelineChoice("split v" if always_v else "split", plan.stages, plan.order, plan.step_s, "")


@cache
def alone(kind: Any, resume: str | None = None, accumulated: int = 1) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[ModelCheckpoint(folder)], gradient_clip_val=0.5,
            accumulate_grad_batches=accumulated,
        )  # fmt: skip
        return fit(trainer, kind(), resume)


def agree(found: Outcome, expected: Outcome) -> None:
    assert found.parameters.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, rtol=1e-10, atol=1e-10, msg=name)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)


def check_held(found: Outcome) -> None:
    """The step that was recorded ran in the order that was planned, so no rank held more than planned."""
    assert found.choice is not None
    assert found.choice.order is not None
    assert found.timeline is not None
    order = found.choice.order
    for rank, planned in enumerate(order.actions):
        own = sorted((p for p in found.timeline.passes if order.ranks[p.stage] == rank), key=lambda p: p.end_s)
        assert [(p.kind, p.stage, p.micro_batch) for p in own] == [*planned]
    assert found.plan is not None
    layers = [float(len(found.plan.held(stage))) for stage in range(order.num_stages)]
    for most, own_layers in zip(most_held(order, layers), found.plan.layers_of_ranks, strict=True):
        assert most <= 4 * own_layers  # what four micro-batches leave in all layers of a rank


def choose_whole(problem: OrderProblem, *, always_v: bool) -> PipelineChoice:
    """Choose as usual among orders with whole layers and whole backward passes."""
    return choose_order(replace(problem, split=False, shared=()), always_v=always_v)


def test_a_v_trains_as_one_device(ranks: RankPools, tmp_path: Path) -> None:
    for outcome in (found := ranks.run(2, train, "auto", [1.0, 2.0], str(tmp_path), None, choose_whole, Deep)):
        agree(outcome, alone(Deep))
        assert outcome.choice is not None
        assert outcome.choice.name == "v"
        assert outcome.plan is not None
        assert outcome.plan.ranks == (0, 1, 0)
        assert outcome.watched
        check_held(outcome)
    record = parse_record((tmp_path / "hetero_run.jsonl").read_text().splitlines())
    assert record.stages is not None
    assert StagePlan(record.stages.ranks, record.stages.ends) == found[0].plan
    assert (record.stages.schedule, len(record.stages.forward_s)) == ("v", 3)
    assert "stage 2 (rank 0)" in build(record)


def test_split_backward_passes_train_as_one_device_and_resume(ranks: RankPools, tmp_path: Path) -> None:
    split = partial(always_split, v_shapes)
    found = ranks.run(2, train, "v", [1.0, 2.0], str(tmp_path / "first"), None, split, Deep)
    for outcome in found:
        agree(outcome, alone(Deep))
        check_held(outcome)
    again = ranks.run(2, train, "auto", [2.0, 1.0], str(tmp_path / "second"), found[0].checkpoint, split, Deep)
    expected = alone(Deep, found[0].checkpoint)
    for outcome in again:
        agree(outcome, expected)


def test_shared_layers_train_as_one_device_and_resume(ranks: RankPools, tmp_path: Path) -> None:
    shared = partial(always_shared, v_shapes)
    found = ranks.run(2, train, "auto", [1.0, 2.0], str(tmp_path / "first"), None, shared, Deep)
    for outcome in found:
        agree(outcome, alone(Deep))
        check_held(outcome)
    again = ranks.run(2, train, "auto", [2.0, 1.0], str(tmp_path / "second"), found[0].checkpoint, shared, Deep)
    expected = alone(Deep, found[0].checkpoint)
    for outcome in again:
        agree(outcome, expected)


class LateHook(Callback):
    """Registers a hook on a layer that two ranks share."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, HeteroPipelineStrategy)
        if strategy.plan is not None and strategy.plan.shared:
            layers: Any = pl_module.model
            layers[strategy.plan.shared[0]].register_forward_hook(lambda *_: None)


def late_hook(folder: str, shared: Any) -> str:
    try:
        train("auto", [1.0, 2.0], folder, None, shared, Deep, 1, LateHook())
    except UnsupportedFeatureError as error:
        return str(error)
    return ""


def test_a_hook_on_a_shared_layer_that_comes_late_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    for message in ranks.run(2, late_hook, str(tmp_path), partial(always_shared, v_shapes)):
        assert "registered on it after the first step" in message


@thorough
@pytest.mark.parametrize("kind", [Deep, Found])
@pytest.mark.parametrize("shapes", [straight_shapes, v_shapes])
@pytest.mark.parametrize("world_size", [2, 3])
def test_shared_layers(ranks: RankPools, tmp_path: Path, shapes: Any, kind: type[Deep], world_size: int) -> None:
    shared, factors = partial(always_shared, shapes), [2.0, 1.0, 3.0][:world_size]
    for outcome in ranks.run(world_size, train, "auto", factors, str(tmp_path), None, shared, kind, 3):
        agree(outcome, alone(kind, None, 3))  # type: ignore[arg-type]  # a class can be hashed
        check_held(outcome)


@thorough
@pytest.mark.parametrize("kind", [Deep, Found])
@pytest.mark.parametrize("shapes", [straight_shapes, v_shapes])
@pytest.mark.parametrize("world_size", [2, 3])
def test_split_backward_passes(
    ranks: RankPools, tmp_path: Path, shapes: Any, kind: type[Deep], world_size: int
) -> None:
    split, factors = partial(always_split, shapes), [2.0, 1.0, 3.0][:world_size]
    for outcome in ranks.run(world_size, train, "auto", factors, str(tmp_path), None, split, kind):
        agree(outcome, alone(kind))  # type: ignore[arg-type]  # a class can be hashed
        check_held(outcome)


def test_a_v_with_stages_that_are_given_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="found by timing"):
        HeteroPipelineStrategy(splits=[4], schedule="v")


def train_where_ranks_differ(folder: str) -> Outcome:
    """Train where rank 0 alone finds that layers can be shared."""
    with mock.patch.object(layer_profile, "can_be_shared", return_value=dist.get_rank() == 0):
        return train("auto", [1.0, 2.0], folder, None, None, Deep)


def test_ranks_need_not_agree_on_what_can_be_shared(ranks: RankPools, tmp_path: Path) -> None:
    for outcome in ranks.run(2, train_where_ranks_differ, str(tmp_path), timeout_s=60.0):
        agree(outcome, alone(Deep))
        assert outcome.plan is not None
        assert outcome.plan.shared == ()
