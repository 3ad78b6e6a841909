"""Hooks of the module and of callbacks see and do under ``hetero_pipeline`` what they do on one device."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy

BATCH_SIZE = 8


def loader(size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).double()), BATCH_SIZE)


class Noting(nn.Linear):
    """A layer that keeps something in an attribute."""

    largest = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        self.largest = max(self.largest, float(out.abs().max()))
        return out


class Busy(LightningModule):
    """Uses hooks for all that scripts use them for."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(
            Noting(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        ).double()
        self.folder = folder
        self.register_buffer("center", torch.zeros((), dtype=torch.float64))
        self.accuracy = BinaryAccuracy()
        self.kept_in_a_list = [MeanMetric()]
        self.noise = 0.5
        self.smoothed = 0.0
        self.steps_begun = 0
        self.losses: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.by_sign: dict[str, int] = defaultdict(lambda: 0)
        self.seen: list[Any] = []
        self.removed = "until the first step"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.steps_begun += 1
        if self.global_step == 6:
            self.optimizers().param_groups[0]["momentum"] = 0.25  # type: ignore[union-attr]
        scores = self.model(x * (1 + self.noise * self.smoothed) + 0.01 * self.center + 0.001 * self.steps_begun)[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(scores, y)
        self.losses.append(loss.detach())
        self.smoothed = 0.9 * self.smoothed + 0.1 * float(loss)
        self.center: Tensor = 0.9 * self.center + 0.1 * scores.detach().mean()
        self.by_sign["positive"] += int((scores > 0).sum())
        self.accuracy.update(scores.detach().sigmoid(), y.long())
        self.kept_in_a_list[0].update(loss.detach())
        if hasattr(self, "removed"):
            del self.removed
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(("batch", float(outputs["loss"]), self.smoothed))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = grad_norm(self, 2)
        self.seen.append(("norms", len(norms), float(norms["grad_2.0_norm_total"])))
        self.log("norm", norms["grad_2.0_norm_total"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = self.model(batch[0])[:, 0]
        self.scores.append(scores)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self.scores.clear()
            return
        self.log("score", torch.cat(self.scores).mean(), sync_dist=True)
        self.scores.clear()
        # an example drawn by the model, with random numbers, on all ranks and on rank 0 only
        drawn = self.model(torch.randn(3, 5, dtype=torch.float64))
        self.seen.append(("drawn", drawn.flatten().tolist()))
        if self.trainer.is_global_zero:
            drawn = self.model(torch.ones(2, 5, dtype=torch.float64))
            self.accuracy.compute()
        self.trainer.strategy.barrier()

    def on_train_epoch_end(self) -> None:
        mean = torch.stack(self.losses).mean()
        self.log("mean_loss", mean)
        self.losses.clear()
        self.seen.append(("epoch", float(mean), dict(self.by_sign), hasattr(self, "removed"), float(self.center)))
        self.seen.append(("layer", self.model[0].largest, float(self.accuracy.compute())))
        self.seen.append(("list", float(self.kept_in_a_list[0].compute())))
        self.seen.append(("weights", sum(float(p.norm()) for p in self.parameters())))
        self.accuracy.reset()
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] *= 0.5
        self.noise *= 0.5
        if self.current_epoch == 0:
            for parameter in self.model[:3].parameters():
                parameter.requires_grad = False
        if self.current_epoch == 1:
            for parameter in self.model[0].parameters():
                parameter.requires_grad = True
        self.trainer.save_checkpoint(Path(self.folder, f"{self.current_epoch}.ckpt"))
        if self.current_epoch == 3:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


class Looking(Callback):
    """A user's callback that reads what steps have left."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append([float(loss) for loss in pl_module.losses])
        self.seen.append([pl_module.model(torch.ones(1, 5, dtype=torch.float64)).item()])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append([pl_module.smoothed, float(len(pl_module.losses))])


def use(splits: tuple[int, ...] | None, folder: str) -> Any:
    options: dict[str, Any] = {
        "max_epochs": 9, "limit_val_batches": None, "num_sanity_val_steps": 1, "enable_checkpointing": False,
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    looking = Looking()
    callbacks = [looking, EarlyStopping("mean_loss", patience=5)]
    if splits is None:
        torch.manual_seed(7)
        trainer = Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **options)
    else:
        strategy = HeteroPipelineStrategy(splits=list(splits), num_microbatches=1)
        trainer = make_trainer(strategy, dist.get_world_size(), callbacks, **options)
    Path(folder).mkdir(exist_ok=True)
    module = Busy(folder)
    torch.manual_seed(5)
    trainer.fit(module, loader(), loader(16))
    module.seen = [(kind, *values) for kind, *values in module.seen]
    groups = [{k: v for k, v in g.items() if k in ("lr", "momentum")} for g in trainer.optimizers[0].param_groups]
    parameters = {name: value.tolist() for name, value in module.state_dict().items()}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rest = (trainer.current_epoch, groups, metrics, parameters, module.steps_begun, dict(module.by_sign))
    return module.seen, looking.seen, rest


def same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), (where, a, b)
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where} {number} of {a[0] if a and isinstance(a[0], str) else ''}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-10), where
    else:
        assert a == b, where


@pytest.mark.parametrize("splits", [(), (2,), (2, 5)], ids=len)
def test_hooks_do_what_they_do_on_one_device(ranks: RankPools, tmp_path: Path, splits: tuple[int, ...]) -> None:
    expected = use(None, str(tmp_path / "one"))
    for found in ranks.run(len(splits) + 1, use, splits, str(tmp_path / "stages"), timeout_s=60):
        same(found[0], expected[0], "module")
        same(found[1], expected[1], "callback")
        same(found[2], expected[2], "result")
    for epoch in range(4):
        saved, one = (torch.load(tmp_path / n / f"{epoch}.ckpt", weights_only=True) for n in ("stages", "one"))
        same(
            {k: v.tolist() for k, v in saved["state_dict"].items()},
            {k: v.tolist() for k, v in one["state_dict"].items()},
        )
        assert saved["global_step"] == one["global_step"]
