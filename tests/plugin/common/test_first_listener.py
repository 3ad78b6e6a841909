"""Hooks that are called before those of all callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import FEATURES, Numbered, loss_of

from lightning_hetero.plugin.common.first_listener import listening_first


class Module(LightningModule):
    """Calls a hook of its own, as people do to share code between hooks."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.network = nn.Linear(FEATURES, 1).double()
        self.order = order

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.on_train_epoch_end()
        return loss_of(self.network, batch[1], batch[2])

    def on_train_epoch_end(self) -> None:
        self.order.append("module")

    def configure_optimizers(self) -> None:
        pass


class Own(Callback):
    """Calls a hook of its own, with and without what Lightning gives it."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.on_train_epoch_end()
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, *_: Any) -> None:
        self.order.append("callback")


class Listener(Callback):
    def __init__(self, order: list[str]) -> None:
        self.order = order

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.order.append("listener")


def test_only_what_lightning_calls_is_preceded(tmp_path: Path) -> None:
    order: list[str] = []
    module = Module(order)
    trainer = Trainer(
        max_epochs=1, callbacks=[Own(order), Own(order)], barebones=True, accelerator="cpu", default_root_dir=tmp_path
    )
    with listening_first(trainer, module, Listener(order)):
        trainer.fit(module, DataLoader(Numbered(1)))
    in_step = ["callback"] * 4 + ["module"]
    assert order == [*in_step, "listener", "callback", "callback", "module"]
