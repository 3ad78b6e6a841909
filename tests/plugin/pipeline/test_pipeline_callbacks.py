"""Callbacks and hooks that act on the model or the optimiser between steps: as on one device, or refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    ModelPruning,
)
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.exceptions import UnsupportedFeatureError


def loader(size: int = 40) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).double()), 8)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lr = 0.3
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).double()
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.model = nn.Sequential(*self.backbone, *self.head)
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(self.model(batch[0])[:, 0], batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.binary_cross_entropy_with_logits(self.model(batch[0])[:, 0], batch[1]))

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class ClipsItself(Plain):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.01)


class ChangesGradients(Plain):
    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(0.1).clamp_(-0.05, 0.05)


class SetsLrInStep(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = 0.01 * (1 + self.global_step)
        if self.global_step == 6:
            self.trainer.should_stop = True
        return loss


class DrawsOnRankZero(Plain):
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0 and self.trainer.is_global_zero:
            self.drawn.append(float(self.model(batch[0]).sum()))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


class Average(Callback):
    """An average of the parameters, as users write it."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                self.average[name].lerp_(parameter, 0.1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                parameter.copy_(self.average[name])


def slower(trainer: Trainer, _: LightningModule) -> None:
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = 0.02


CASES: dict[str, tuple[type[Plain], Callable[[], list[Callback]]]] = {
    "clipped in a hook": (ClipsItself, list),
    "gradients changed": (ChangesGradients, list),
    "learning rate and end set in a step": (SetsLrInStep, list),
    "drawn on rank 0": (DrawsOnRankZero, list),
    "unfrozen": (Plain, lambda: [Thaw()]),
    "a backbone unfrozen": (Plain, lambda: [BackboneFinetuning(1, lambda _: 1.5, backbone_initial_lr=0.01)]),
    "averaged": (Plain, lambda: [Average(), EarlyStopping("val_loss", patience=1)]),
    "accumulated": (Plain, lambda: [GradientAccumulationScheduler({1: 2}), LambdaCallback(on_train_epoch_end=slower)]),
}


def trainer_with(callbacks: list[Callback], **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "max_epochs": 2, "num_sanity_val_steps": 1, "limit_val_batches": None, **options,
    }  # fmt: skip
    if "LOCAL_RANK" not in os.environ:
        return Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **quiet)
    return make_trainer(
        HeteroPipelineStrategy(splits=[3], num_microbatches=2), dist.get_world_size(), callbacks, **quiet
    )


def train_all() -> dict[str, Any]:
    found = {}
    for name, (kind, callbacks) in CASES.items():
        module, trainer = kind(), trainer_with(callbacks())
        trainer.fit(module, loader(), loader(16))
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        parameters = torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()
        found[name] = (trainer.global_step, len(rates), [*parameters, *rates])
    module = Plain()
    tuner = Tuner(trainer_with([]))
    tuner.lr_find(module, loader(), num_training=20, min_lr=1e-3)
    found["learning rate found"] = (0, 0, [module.lr])
    return found


def test_what_acts_between_steps_does_as_on_one_device(ranks: RankPools) -> None:
    expected = train_all()
    for found in ranks.run(2, train_all, timeout_s=90):
        for name, (steps, groups, numbers) in expected.items():
            assert found[name][:2] == (steps, groups), name
            assert found[name][2] == pytest.approx(numbers, abs=1e-10), name


class Hooked(Plain):
    def __init__(self) -> None:
        super().__init__()
        weight: Any = self.model[0].weight
        weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))


class HookedLate(Plain):
    def on_fit_start(self) -> None:
        weight: Any = self.model[2].weight
        weight.register_post_accumulate_grad_hook(lambda parameter: None)


class Sharp(torch.optim.SGD):
    """Runs the step twice."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class WithSharp(Plain):
    def configure_optimizers(self) -> Any:
        return Sharp(self.parameters(), lr=0.1)


REFUSED: list[tuple[type[Plain], Callable[[], list[Callback]], str]] = [
    (Plain, lambda: [ModelPruning("l1_unstructured", amount=0.5)], "ModelPruning replaces parameters"),
    (Hooked, list, "got one on 'backbone.0.weight'"),
    (HookedLate, list, "got one on 'backbone.2.weight'"),
    (WithSharp, list, "cannot train with Sharp, which runs the training step several times"),
]


def refused_all() -> list[str]:
    found = []
    for kind, callbacks, _ in REFUSED:
        with pytest.raises(UnsupportedFeatureError) as caught:
            trainer_with(callbacks()).fit(kind(), loader())
        found.append(str(caught.value))
    return found


def test_what_is_refused_by_name(ranks: RankPools) -> None:
    for found in ranks.run(2, refused_all, timeout_s=60):
        for message, (_, _, expected) in zip(found, REFUSED, strict=True):
            assert expected in message
