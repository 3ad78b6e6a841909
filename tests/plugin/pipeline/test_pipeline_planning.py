"""Stages that are found by measuring: their number of layers follows speed, and nothing else changes."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.utils.data import DataLoader, TensorDataset
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy, PipelineRecorder
from lightning_hetero.balance.pipeline.orders.order import known_order
from lightning_hetero.balance.pipeline.simulation import Timeline
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.exceptions import InfeasiblePlanError
from lightning_hetero.testing import SlowLayers

LAYERS, FEATURES, BATCH_SIZE = 12, 6, 8


class Deep(LightningModule):
    """Twelve layers of equal cost, and a value that only the loss uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)))
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        loss: Tensor = (self.scale * self.model(x) - x).square().mean()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(size: int = 40) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(size, FEATURES, generator=generator)), BATCH_SIZE)


@dataclass
class Found:
    """What a rank has seen."""

    plan: StagePlan
    costs: LayerCosts
    parameters: dict[str, Tensor]
    predicted_s: float
    checkpoint: str
    timeline: Timeline | None


def train(factors: list[float], folder: str, epochs: int = 1, resume: str | None = None, **options: Any) -> Found:
    strategy = HeteroPipelineStrategy(num_microbatches=8, schedule="1f1b", verbose=False, **options)
    slow = SlowLayers(factors, seconds_per_sample=0.003)
    recorder = PipelineRecorder(step=3, record=folder)
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = make_trainer(
        strategy, dist.get_world_size(), [slow, saving, recorder], max_epochs=epochs, limit_val_batches=None,
        num_sanity_val_steps=1, enable_checkpointing=True,
    )  # fmt: skip
    module = Deep()
    gc.disable()  # nothing may wait for it
    trainer.fit(module, loader(), loader(16), ckpt_path=resume)
    assert strategy.plan is not None
    assert strategy.findings is not None
    # the type, because `isinstance` asks the object, which may be a proxy of one that is gone
    stages = [thing for thing in gc.get_objects() if issubclass(type(thing), PipelineStage)]
    gc.enable()
    assert not stages, "a stage that nobody needs holds the process group, which then ends with an error"
    return Found(
        strategy.plan, strategy.findings.costs, dict(module.state_dict()), strategy.findings.advice.step_s,
        saving._last_checkpoint_saved, recorder.timeline,
    )  # fmt: skip


def alone(epochs: int) -> dict[str, Tensor]:
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    module = Deep()
    trainer.fit(module, loader(), loader(16))
    return dict(module.state_dict())


def agree_with(expected: dict[str, Tensor], found: list[Found]) -> None:
    for outcome in found:
        for name, value in outcome.parameters.items():
            assert torch.allclose(value, expected[name], atol=1e-6), name


def check_record(path: Path, found: Found) -> None:
    record = parse_record(path.read_text().splitlines())
    assert record.header.strategy == "hetero_pipeline"
    assert record.header.world_size == 2
    assert record.stages is not None
    assert StagePlan(record.stages.ranks, record.stages.ends) == found.plan
    assert record.stages.step_s == pytest.approx(found.predicted_s, rel=1e-4)
    assert record.stages.uniform_step_s > record.stages.step_s
    assert record.passes is not None
    assert found.timeline is not None
    assert len(record.passes.stages) == len(found.timeline.passes) == 2 * 2 * 8
    assert max(record.passes.end_s) == pytest.approx(found.timeline.step_s, rel=1e-4)
    assert record.end is not None


def test_a_rank_half_as_fast_gets_half_the_layers_and_the_training_is_the_same(
    ranks: RankPools, tmp_path: Path
) -> None:
    """The plan changes after the check of the validation loop, and again where a run resumes on other devices."""
    found = ranks.run(2, train, [1.0, 2.0], str(tmp_path / "first"))
    check_record(tmp_path / "first" / "hetero_run.jsonl", found[0])
    for outcome in found:
        assert outcome.plan == StagePlan((1, 0), (4, 12))
        ratio = sum(outcome.costs.total_s[1]) / sum(outcome.costs.total_s[0])
        assert 1.8 < ratio < 2.2
        check_recorded_step(outcome.timeline)
    agree_with(alone(1), found)
    # with Adam's state of each layer on the move
    again = ranks.run(2, train, [2.0, 1.0], str(tmp_path / "second"), 2, found[0].checkpoint)
    for outcome in again:
        assert outcome.plan == StagePlan((1, 0), (8, 12))
    agree_with(alone(2), again)


def check_recorded_step(timeline: Timeline | None) -> None:
    """Every pass once, in the order of the schedule, and none before what it needs."""
    assert timeline is not None
    ends = {(one.kind, one.stage, one.micro_batch): one.end_s for one in timeline.passes}
    assert len(ends) == len(timeline.passes) == 2 * 2 * 8
    orders = known_order((0, 1), 8, "1f1b").actions
    for stage in range(2):
        own = sorted((one for one in timeline.passes if one.stage == stage), key=lambda one: one.start_s)
        assert [(one.kind, one.stage, one.micro_batch) for one in own] == [*orders[stage]]
        assert all(a.end_s <= b.start_s for a, b in pairwise(own))
        for one in own:
            before = 0 if one.kind == "forward" else 1
            if stage != before:
                assert ends[one.kind, before, one.micro_batch] <= one.start_s + 0.002  # two clocks


def test_three_speeds(ranks: RankPools, tmp_path: Path) -> None:
    (plan,) = {outcome.plan for outcome in ranks.run(3, train, [1.0, 4.0, 2.0], str(tmp_path))}
    layers = plan.layers_of_ranks
    assert sum(layers) == LAYERS
    assert layers[0] > layers[2] > layers[1]
    assert layers[0] in (6, 7)


def with_speeds(speeds: list[float]) -> tuple[StagePlan | None, bool, dict[str, Tensor]]:
    strategy = HeteroPipelineStrategy(speeds=speeds)
    module = Deep()
    make_trainer(strategy, len(speeds), max_epochs=1).fit(module, loader())
    return strategy.plan, strategy.findings is None, dict(module.state_dict())


def test_speeds_that_are_given_are_not_measured(ranks: RankPools) -> None:
    for plan, nothing_measured, parameters in ranks.run(2, with_speeds, [2.0, 1.0]):
        assert plan == StagePlan((1, 0), (4, 12))
        assert nothing_measured
        expected = alone(1)
        assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in parameters.items())


def too_much_for_two(folder: str) -> str:
    with pytest.raises(InfeasiblePlanError) as caught:
        train([1.0, 1.0], folder, max_memory_bytes=1000)
    return str(caught.value)


def test_memory_limits_what_a_fast_rank_gets(ranks: RankPools, tmp_path: Path) -> None:
    layer_bytes = (FEATURES * FEATURES + FEATURES) * 4 * 4  # parameter, gradient and the two numbers of Adam, float32
    limits = [6 * layer_bytes - 1, 100 * layer_bytes]  # not quite six layers
    for outcome in ranks.run(2, limited, str(tmp_path), limits):
        assert outcome.plan.layers_of_ranks[0] < 6
    messages = ranks.run(2, too_much_for_two, str(tmp_path))
    assert all("The layers must fit into the memory of the 2 ranks" in message for message in messages)


def limited(folder: str, limits: list[int]) -> Found:
    return train([1.0, 2.0], folder, max_memory_bytes=limits)


def move_about() -> list[bool]:
    """Go through several plans, a tied layer among them, with a state of the optimiser that is that of the layer."""
    torch.manual_seed(5)
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, nn.Linear(2, 2), nn.BatchNorm1d(2), shared, nn.Linear(2, 2))
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    layers = list(module)
    placement = TensorPlacement(module, layers, StagePlan((1, 2, 0), (1, 3, 5)), torch.device("cpu"))
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in placement.parameters:
        optimizer.state[parameter] = {"exp_avg": parameter.detach().clone(), "step": torch.tensor(3.0)}
    checks = []
    for plan in (StagePlan((2, 1, 0), (2, 4, 5)), StagePlan((1, 2, 0), (1, 2, 5)), StagePlan((1, 2, 0), (1, 3, 5))):
        placement.move(plan, [optimizer])
        own = [tensor for layer in placement.own_layers for tensor in (*layer.parameters(), *layer.buffers())]
        checks.append(not any(tensor.is_meta for tensor in own))
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            checks.append(tensor.is_meta != placement.owns(tensor))
            checks.append(tensor.is_meta or torch.equal(tensor, expected[name]))
        for parameter in module.parameters():
            state = optimizer.state.get(parameter)
            checks.append((state is not None) == placement.owns(parameter))
            checks.append(state is None or torch.equal(state["exp_avg"], parameter))
    placement.complete()
    checks += [torch.equal(value, expected[name]) for name, value in module.state_dict().items()]
    checks.append(module[0].weight is module[3].weight)
    return checks


def test_tensors_move_with_what_optimisers_keep(ranks: RankPools) -> None:
    for checks in ranks.run(3, move_about):
        assert all(checks), checks
