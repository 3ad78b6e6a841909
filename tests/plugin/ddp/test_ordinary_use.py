"""Whatever the Trainer is asked for, unequal shares end with the parameters of ddp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, assert_close, flat, make_trainer

from lightning_hetero import HeteroDDPStrategy


class TwoEvaluationLoaders(SmallModule):
    """Its evaluation steps take the number of the loader."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
        _, features, targets = batch
        self.log("val_loss", torch.nn.functional.mse_loss(self.network(features), targets), sync_dist=True)

    test_step = validation_step  # type: ignore[assignment]


class Manual(TwoEvaluationLoaders):
    """Two optimisers and two backward passes per step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        _, features, targets = batch
        for number, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(self.network(features), targets * (number + 1))
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        first, _, last = self.network.children()
        return [torch.optim.SGD(first.parameters(), lr=0.05), torch.optim.Adam(last.parameters(), lr=0.01)]


class SecondOrder(TwoEvaluationLoaders):
    """L-BFGS runs the step several times on the same batch."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Unused(TwoEvaluationLoaders):
    """Has a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = torch.nn.Linear(2, 2).double()


class Scheduled(TwoEvaluationLoaders):
    """Asks for the number of steps where the optimiser is made, as schedulers do: the loader is set up before a
    resumed run knows where it goes on."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


MODULES = {"plain": TwoEvaluationLoaders, "manual": Manual, "lbfgs": SecondOrder, "unused": Unused}


def run(
    hetero: bool,
    trainer: dict[str, Any],
    loader: dict[str, Any],
    strategy: dict[str, Any],
    module: str,
    fits: int = 1,
) -> list[float]:
    """Fit, with a validation loop over two loaders, and test afterwards; return the parameters."""
    world_size = dist.get_world_size()
    model = MODULES[module]()
    made = HeteroDDPStrategy(shares=[5, 2], **strategy) if hetero else DDPStrategy(**strategy)
    settings = {"max_epochs": 2, "max_steps": -1, "limit_val_batches": 1.0, "num_sanity_val_steps": 2} | trainer
    fitted = make_trainer(made, world_size, [EarlyStopping("val_loss/dataloader_idx_0", patience=9)], **settings)
    training = DataLoader(Numbered(46), batch_size=4, shuffle=True, **loader)
    evaluation = [DataLoader(Numbered(10), batch_size=4), DataLoader(Numbered(6), batch_size=2)]
    for _ in range(fits):
        fitted.fit(model, training, evaluation)
        fitted.fit_loop.max_epochs = (fitted.fit_loop.max_epochs or 0) + 2
    fitted.test(model, evaluation, verbose=False)
    return flat(model.network)


@pytest.mark.parametrize(
    ("trainer", "loader", "strategy", "module"),
    [
        pytest.param({}, {}, {}, "plain", id="epochs_with_validation"),
        pytest.param({"fast_dev_run": 3}, {}, {}, "plain", id="fast_dev_run"),
        pytest.param({"overfit_batches": 2}, {}, {}, "plain", id="overfit_batches"),
        pytest.param(
            {"limit_train_batches": 4},
            {"num_workers": 1, "persistent_workers": True},
            {},
            "plain",
            id="limit_with_workers",
        ),
        pytest.param({"val_check_interval": 2}, {}, {}, "plain", id="val_check_interval"),
        pytest.param({"reload_dataloaders_every_n_epochs": 1}, {}, {}, "plain", id="reload"),
        pytest.param({"accumulate_grad_batches": 3}, {}, {}, "plain", id="accumulation_with_ragged_end"),
        pytest.param({}, {}, {"find_unused_parameters": True}, "manual", id="manual"),
        pytest.param({}, {}, {}, "lbfgs", id="lbfgs"),
        pytest.param({}, {}, {"find_unused_parameters": True}, "unused", id="unused_parameters"),
        pytest.param({}, {}, {"static_graph": True}, "plain", id="static_graph"),
        pytest.param({}, {}, {"gradient_as_bucket_view": True}, "plain", id="bucket_view"),
    ],
)
def test_ends_where_ddp_ends(
    ranks: RankPools, trainer: dict[str, Any], loader: dict[str, Any], strategy: dict[str, Any], module: str
) -> None:
    hetero = ranks.run(2, run, True, trainer, loader, strategy, module)
    plain = ranks.run(2, run, False, trainer, loader, strategy, module)
    assert hetero[0] == hetero[1]
    assert_close(hetero[0], plain[0])


def test_fitting_again_goes_on(ranks: RankPools) -> None:
    hetero = ranks.run(2, run, True, {}, {}, {}, "plain", 2)
    plain = ranks.run(2, run, False, {}, {}, {}, "plain", 2)
    assert_close(hetero[0], plain[0])


class SaveAfter(Callback):
    """Saves at the end of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def resumed(hetero: bool, folder: Path, loader: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Train four epochs and save after two, then go on from there; return the parameters and the first batch."""
    path = folder / f"{hetero}-{len(loader)}.ckpt"
    for checkpoint in (None, path):
        model = Scheduled()
        strategy = HeteroDDPStrategy(shares=[5, 2]) if hetero else DDPStrategy()
        callbacks = [SaveAfter(path)] if checkpoint is None else []
        trainer = make_trainer(strategy, dist.get_world_size(), callbacks, max_epochs=4, max_steps=-1)
        training = DataLoader(Numbered(46), batch_size=4, shuffle=True, **loader)
        trainer.fit(model, training, ckpt_path=checkpoint, weights_only=False)
    assert len(model.ledger) == 12
    return flat(model.network), model.ledger[0]


def test_a_resumed_run_ends_where_ddp_ends(ranks: RankPools, tmp_path: Path) -> None:
    hetero = ranks.run(2, resumed, True, tmp_path, {})
    plain = ranks.run(2, resumed, False, tmp_path, {})
    assert hetero[0][0] == hetero[1][0]
    assert_close(hetero[0][0], plain[0][0])
    assert {*hetero[0][1], *hetero[1][1]} == {*plain[0][1], *plain[1][1]}


def test_workers_do_not_change_how_a_run_is_resumed(ranks: RankPools, tmp_path: Path) -> None:
    """Under ddp they do: they begin to read before the epoch is set."""
    without = ranks.run(2, resumed, True, tmp_path, {})
    workers = ranks.run(2, resumed, True, tmp_path, {"num_workers": 1, "persistent_workers": True})
    assert workers == without
