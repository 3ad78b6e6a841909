"""What is private in Lightning is there, and does what is relied on; what needs ranks is tested where it is used."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.plugin.common import base_strategy
from lightning_hetero.plugin.common.lightning_private import (
    accumulates,
    before_batch_transfer,
    called_by_lightning_loop,
    combined_loaders,
    connect_through,
    evaluation_loop,
    inner_batch_sampler,
    leaving_together,
    lightning_closes_group,
    logged_step,
    logged_values,
    samplers_stay,
    telling_indices,
    tells_indices,
    trainer_of,
    uses_post_local_sgd,
    with_synchronised_layers,
    wrap_checkpoint_io,
)


class Asks(DataLoader[Any]):
    """Asks by whom it is iterated."""

    answers: list[bool]

    def __iter__(self) -> Any:
        vars(self).setdefault("answers", []).append(called_by_lightning_loop())
        return super().__iter__()


class Looks(BoringModel):
    """Looks at what is private while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def train_dataloader(self) -> Any:
        return Asks(torch.randn(4, 32), batch_size=2)  # type: ignore[arg-type]

    val_dataloader = train_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen["hook"] = dataloader_idx
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loader: Any = self.trainer.train_dataloader
        list(loader)  # as a callback may
        self.log("value", 1.0)
        self.seen["logged"] = sorted(logged_values(self.trainer))
        self.seen["step"] = logged_step(self.trainer.fit_loop)
        self.seen["training"] = combined_loaders(self.trainer.fit_loop)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen["evaluation"] = combined_loaders(evaluation_loop(self.trainer))
        return super().validation_step(batch, batch_idx)


def trained(tmp_path: Path) -> tuple[Looks, Trainer]:
    model = Looks()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    assert trainer_of(model) is None
    trainer.fit(model)
    return model, trainer


def test_loops_tell_what_they_read_and_count(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    (training,), mode = model.seen["training"]
    assert (mode, training.answers) == ("max_size_cycle", [True, False, False])
    (evaluation,), mode = model.seen["evaluation"]
    assert (mode, evaluation.answers) == ("sequential", [True])
    assert model.seen["logged"] == ["training_step.value"]
    assert model.seen["step"] == 1
    assert trainer_of(model)
    model.seen["hook"] = None
    assert before_batch_transfer(model, "batch") == "batch"
    assert model.seen["hook"] == 0


def test_samplers_are_left_as_they_are() -> None:
    class Counts(LightningModule):
        pass

    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    trainer.strategy._lightning_module = Counts()
    assert trainer._accelerator_connector.use_distributed_sampler
    samplers_stay(trainer)
    assert not trainer._accelerator_connector.use_distributed_sampler


def test_predictions_tell_their_indices() -> None:
    batches = BatchSampler(SequentialSampler(range(4)), 2, drop_last=False)
    wrapped = telling_indices(batches)
    assert (tells_indices(batches), tells_indices(wrapped)) == (False, True)
    assert inner_batch_sampler(wrapped) is inner_batch_sampler(batches) is batches
    assert list(wrapped) == [[0, 1], [2, 3]]
    assert wrapped.seen_batch_indices == [[0, 1], [2, 3]]


def test_post_local_sgd_is_recognised() -> None:
    state = PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=1)
    assert uses_post_local_sgd(DDPStrategy(ddp_comm_state=state))
    assert not uses_post_local_sgd(DDPStrategy())


def test_a_plugin_that_wraps_another_is_given_ours_unless_it_has_one() -> None:
    inner, wrapper = TorchCheckpointIO(), AsyncCheckpointIO()
    assert wrap_checkpoint_io(wrapper, inner)
    assert wrapper.checkpoint_io is inner
    assert not wrap_checkpoint_io(TorchCheckpointIO(), inner)
    assert not wrap_checkpoint_io(None, inner)


@pytest.mark.parametrize(("told", "batches"), [(True, 0), (False, 1)])
def test_ranks_leave_before_a_batch(told: bool, batches: int) -> None:
    """Rank 0 tells all others before the next batch; a rank that alone has received the signal waits for another."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.state.fn, trainer.state.stage = TrainerFn.FITTING, RunningStage.TRAINING
    loop: Any = trainer.fit_loop.epoch_loop
    signals: Any = trainer._signal_connector
    with leaving_together(trainer, lambda flag: flag and told):
        loop._broadcast_sigterm_tensor()
        signals._sigterm_notifier_fn(15, None)
        assert not trainer.received_sigterm  # Lightning would leave after this batch, without the peers
        for _ in range(batches):
            loop._broadcast_sigterm_tensor()
        with pytest.raises(SIGTERMException):
            loop._broadcast_sigterm_tensor()
        assert trainer.received_sigterm
    with leaving_together(trainer, lambda _: False):
        signals.received_sigterm, trainer.state.stage = False, RunningStage.VALIDATING
        signals._sigterm_notifier_fn(15, None)
        assert trainer.received_sigterm
    assert "_sigterm_notifier_fn" not in vars(signals)


def test_lightning_closes_the_group_of_nccl_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no NCCL here, so no group is started either."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    handlers: list[Any] = []

    def unregister(handler: Any) -> None:
        while handler in handlers:
            handlers.remove(handler)

    monkeypatch.setattr(atexit, "register", handlers.append)
    monkeypatch.setattr(atexit, "unregister", unregister)
    connect_through(LightningEnvironment(), "nccl", None, None, torch.device("cpu"))
    assert len(handlers) == 1
    lightning_closes_group(True)
    assert len(handlers) == 1
    lightning_closes_group(False)
    assert not handlers


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_rank_that_has_failed_leaves_its_group_to_be_aborted(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    told: list[bool] = []
    for name, value in vars(base_strategy).items():
        if value is lightning_closes_group:
            monkeypatch.setattr(base_strategy, name, told.append)
    strategy = HeteroDDPStrategy(process_group_backend=backend)
    monkeypatch.setattr(DDPStrategy, "teardown", lambda _: None)
    strategy.teardown()
    assert told == [True] * (backend == "nccl")
    told.clear()
    strategy.on_exception(ValueError("raised by a test"))
    strategy.teardown()
    assert told == [False]


class Accumulating(BoringModel):
    """Asks whether a batch ends without a step of the optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[bool] = []
        self.normalisation = torch.nn.BatchNorm1d(2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.answers.append(accumulates(self.trainer))
        return super().training_step(batch, batch_idx)


def test_a_batch_that_ends_without_a_step_is_known_before(tmp_path: Path) -> None:
    module = Accumulating()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=5, limit_val_batches=0, logger=False,
        accumulate_grad_batches=2, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module)
    assert module.answers == [True, False, True, False, False]


def test_layers_are_synchronised_if_the_trainer_says_so() -> None:
    kinds = []
    for synchronised in (False, True):
        strategy = DDPStrategy()
        Trainer(accelerator="cpu", devices=1, strategy=strategy, sync_batchnorm=synchronised, logger=False)
        kinds.append(type(with_synchronised_layers(strategy, Accumulating()).normalisation))
    assert kinds == [torch.nn.BatchNorm1d, torch.nn.SyncBatchNorm]
