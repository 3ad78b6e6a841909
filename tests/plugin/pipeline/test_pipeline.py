"""A model split over ranks trains as it does in one process; on real gloo ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanAbsoluteError
from training import make_trainer

from lightning_hetero.balance.pipeline.stages import Schedule
from lightning_hetero.plugin.pipeline.strategy import HeteroPipelineStrategy

FEATURES = 6
BATCH_SIZE = 12
SAMPLES = 46  # three batches of 12 and one of 10


class Samples(Dataset[Any]):
    """Features and a target, from a fixed seed."""

    def __init__(self, size: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, FEATURES, generator=generator)
        self.y = self.x.square().sum(1, keepdim=True) + torch.randn(size, 1, generator=generator) / 10

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@dataclass(frozen=True)
class Case:
    """How a model is split and trained."""

    splits: tuple[int, ...]
    schedule: Schedule = "1f1b"
    micro_batches: int = 4
    kind: str = "mlp"
    trainer: tuple[tuple[str, Any], ...] = ()
    samples: int = SAMPLES

    @property
    def world_size(self) -> int:
        return len(self.splits) + 1


def mlp() -> list[nn.Module]:
    layers: list[nn.Module] = []
    for a, b in ((FEATURES, 8), (8, 8), (8, 8), (8, 1)):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return layers[:-1]


class Mlp(LightningModule):
    """Knows nothing of this package: a temperature after the model, two groups, a plateau scheduler, metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = nn.Sequential(*mlp())
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.error = MeanAbsoluteError()

    def predicted(self, x: Tensor) -> Tensor:
        prediction: Tensor = self.model(x) * self.temperature
        return prediction

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        predicted = self.predicted(x)
        loss = nn.functional.mse_loss(predicted, y)
        self.error(predicted, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("error", self.error, on_step=False, on_epoch=True)
        return {"loss": loss, "predicted": predicted}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.predicted(x), y), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log_dict({"test_loss": nn.functional.mse_loss(self.predicted(x), y), "batch": float(batch_idx)})

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.predicted(batch[0])

    def configure_optimizers(self) -> Any:
        weights = [p for n, p in self.named_parameters() if n.endswith("weight")]
        others = [p for n, p in self.named_parameters() if not n.endswith("weight")]
        optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.005}], 0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Normalised(Mlp):
    """Batch normalisation, a frozen first layer, and a layer without parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(  # no bias before a normalisation: its gradient is zero, and Adam amplifies rounding
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(),
            nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 1),
        )  # fmt: skip
        self.model[0].requires_grad_(False)


class Embedding(nn.Module):
    """Tokens and which of them are real, as a dict with a tensor that is no number and one that is transposed."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor, lengths: Tensor) -> Any:
        mask = torch.arange(tokens.shape[1], device=tokens.device)[None] >= lengths[:, None]
        return {"x": self.table(tokens).transpose(0, 1), "mask": mask, "tokens": tokens}


class Block(nn.Module):
    """Attention over the real tokens, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, value: Any) -> Any:
        x = self.attention(value["x"].transpose(0, 1), src_key_padding_mask=value["mask"])
        return {**value, "x": x.transpose(0, 1)}


class Head(nn.Module):
    """Scores of tokens, with the embedding's own weights."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, value: Any) -> Tensor:
        scores: Tensor = value["x"].transpose(0, 1) @ self.table.weight.T
        return scores


class Tokens(Dataset[Any]):
    """Sequences of several lengths, padded."""

    def __init__(self, size: int = SAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(1, 11, (size, 7), generator=generator)
        self.lengths = torch.randint(2, 8, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Any:
        return {"tokens": self.tokens[index], "length": self.lengths[index], "name": str(index)}


def real_tokens(batch: Any) -> int:
    return int(batch["length"].sum())


class Transformer(LightningModule):
    """Tied weights on the first and the last stage, layers on the module, a loss that averages over tokens."""

    def __init__(self) -> None:
        super().__init__()
        table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Embedding(table), Block(), Block(), Head(table)])

    def pipeline_layers(self) -> Any:
        return self.layers

    def forward(self, tokens: Tensor, lengths: Tensor) -> Any:
        value = self.layers[0](tokens, lengths)
        for layer in list(self.layers)[1:]:
            value = layer(value)
        return value

    def loss(self, batch: Any) -> Tensor:
        tokens, lengths = batch["tokens"], batch["length"]
        labels = torch.where(torch.arange(7, device=tokens.device)[None] < lengths[:, None], tokens, -100)
        scores = self(tokens, lengths)
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores: Tensor = self(batch["tokens"], batch["length"])
        return scores

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.97**step)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


KINDS: dict[str, Any] = {"mlp": Mlp, "normalised": Normalised, "transformer": Transformer}


class Seen(Callback):
    """Keeps the loss of each step, as callbacks are told it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


@dataclass(frozen=True)
class Outcome:
    """What a training did, as seen on one rank."""

    losses: list[float]
    metrics: dict[str, float]
    parameters: dict[str, Tensor]
    rates: list[float]
    predictions: list[Tensor] = field(default_factory=list)


def model_of(case: Case) -> LightningModule:
    torch.manual_seed(3)
    model: LightningModule = KINDS[case.kind]()
    return model


def train(case: Case) -> Outcome:
    """Train on the ranks of the harness, or in this process."""
    options: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": None, **dict(case.trainer)}
    seen = Seen()
    if "LOCAL_RANK" in os.environ:
        strategy: Any = HeteroPipelineStrategy(
            splits=list(case.splits), num_microbatches=case.micro_batches, schedule=case.schedule,
            num_loss_terms=real_tokens if case.kind == "transformer" else None,
        )  # fmt: skip
        trainer = make_trainer(strategy, dist.get_world_size(), [seen], **options)
        torch.manual_seed(17 if dist.get_rank() == 0 else 5)  # only rank 0's random numbers decide
    else:
        trainer = Trainer(
            accelerator="cpu", devices=1, callbacks=[seen], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options
        )  # fmt: skip
    model = model_of(case)
    torch.manual_seed(11)
    data: Any = Tokens if case.kind == "transformer" else Samples
    train_loader = DataLoader(data(case.samples), BATCH_SIZE, shuffle=True)
    trainer.fit(model, train_loader, DataLoader(data(30), BATCH_SIZE))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    metrics |= trainer.test(model, DataLoader(data(22), BATCH_SIZE), verbose=False)[0]
    predictions: list[Any] = trainer.predict(model, DataLoader(data(22), BATCH_SIZE)) or []
    return Outcome(seen.losses, metrics, parameters, rates, [p for p in predictions if p is not None])


@cache
def alone(kind: str, options: tuple[tuple[str, Any], ...], samples: int) -> Outcome:
    return train(Case((), kind=kind, trainer=options, samples=samples))


def check(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=tolerance)
    assert found.metrics == pytest.approx(expected.metrics, rel=tolerance, abs=tolerance)
    assert found.rates == expected.rates
    assert list(found.parameters) == list(expected.parameters)
    for name, value in found.parameters.items():
        assert float((value - expected.parameters[name]).abs().max()) < tolerance, name


def run(ranks: RankPools, case: Case, tolerance: float = 1e-6) -> Sequence[Outcome]:
    outcomes: list[Outcome] = ranks.run(case.world_size, train, case, timeout_s=90)
    expected = alone(case.kind, case.trainer, case.samples)
    for outcome in outcomes:
        check(outcome, expected, tolerance)
    for found, other in zip(outcomes[0].predictions, expected.predictions, strict=True):
        torch.testing.assert_close(found.cpu(), other, atol=5e-6, rtol=1e-5)
    return outcomes


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("splits", [(), (2,), (5,), (1, 4), (1, 2, 6)])
def test_stages_train_as_one_process(ranks: RankPools, splits: tuple[int, ...], schedule: Schedule) -> None:
    run(ranks, Case(splits, schedule))


@pytest.mark.parametrize(
    "case",
    [
        Case((3,), trainer=(("gradient_clip_val", 5.0),)),
        Case((1, 4), trainer=(("gradient_clip_val", 0.01), ("gradient_clip_algorithm", "value"))),
        Case((4,), trainer=(("accumulate_grad_batches", 2), ("gradient_clip_val", 20.0))),
        Case((2,), samples=37, micro_batches=8),  # a last batch of one sample
        Case((1, 2, 6), micro_batches=2),  # fewer micro-batches than stages
        Case((2,), micro_batches=50),
        Case((2,), micro_batches=1, trainer=(("precision", "bf16-mixed"),)),
        Case((2,), micro_batches=1, kind="normalised"),
        Case((2,), kind="transformer"),
        Case((1, 3), kind="transformer", schedule="gpipe", trainer=(("gradient_clip_val", 0.5),)),
        Case((1,), kind="transformer", trainer=(("accumulate_grad_batches", 2),)),
    ],
    ids=str,
)
def test_what_trainings_are_made_of(ranks: RankPools, case: Case) -> None:
    run(ranks, case)


def test_batch_normalisation_counts_every_micro_batch(ranks: RankPools) -> None:
    outcome = ranks.run(2, train, Case((3,), kind="normalised"), timeout_s=90)[0]
    micro_batches = 3 * 4 * 4  # of 3 epochs of 4 steps
    for layer in (1, 4):
        assert outcome.parameters[f"model.{layer}.running_var"].isfinite().all()
        assert int(outcome.parameters[f"model.{layer}.num_batches_tracked"]) == micro_batches


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def train_part(splits: tuple[int, ...] | None, folder: str, epochs: int, resume: str | None) -> dict[str, Any]:
    """Train until ``epochs``, from a checkpoint if there is one, and return the last checkpoint."""
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, monitor="val_loss")
    stopping = EarlyStopping("val_loss", patience=50)
    options: dict[str, Any] = {
        "max_epochs": epochs, "limit_val_batches": None, "enable_checkpointing": True, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    if splits is None:
        trainer = Trainer(accelerator="cpu", devices=1, callbacks=[saving, stopping], **options)
    else:
        strategy = HeteroPipelineStrategy(splits=list(splits))
        trainer = make_trainer(strategy, dist.get_world_size(), [saving, stopping], **options)
    torch.manual_seed(3)
    model = Mlp()
    # in order: one device has a plain loader's shuffling in no checkpoint
    trainer.fit(model, DataLoader(Samples(), BATCH_SIZE), DataLoader(Samples(30), BATCH_SIZE), ckpt_path=resume)
    trainer.save_checkpoint(Path(folder, "after.ckpt"))  # as users do
    return torch.load(saving._last_checkpoint_saved, weights_only=True)  # type: ignore[no-any-return]


def same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.allclose(a.float(), b.float(), atol=1e-6), (a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == pytest.approx(b)


def test_checkpoints_are_those_of_one_device_and_go_everywhere(ranks: RankPools, tmp_path: Path) -> None:
    """One device to three stages, three stages to two, two to one device: as if one device had made each part."""

    def folder(name: str) -> str:
        (tmp_path / name).mkdir()
        return str(tmp_path / name)

    parts: list[tuple[str, tuple[int, ...] | None]] = [("one", None), ("three", (1, 4)), ("two", (5,)), ("last", None)]
    found: list[dict[str, Any]] = []
    expected: list[dict[str, Any]] = []
    for epoch, (name, splits) in enumerate(parts):
        before = f"epoch={epoch - 1}.ckpt"
        resume = str(tmp_path / parts[epoch - 1][0] / before) if epoch else None
        job = (splits, folder(name), epoch + 1, resume)
        found.append(train_part(*job) if splits is None else ranks.run(len(splits) + 1, train_part, *job)[0])
        resume = str(tmp_path / f"{parts[epoch - 1][0]} on one device" / before) if epoch else None
        expected.append(train_part(None, folder(f"{name} on one device"), epoch + 1, resume))
    for saved, one_device in zip(found, expected, strict=True):
        assert set(saved) - {"lightning_hetero"} == set(one_device)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            same(saved[part], one_device[part])
    for name, _ in parts:
        saved, one_device = (
            torch.load(tmp_path / n / "after.ckpt", weights_only=True) for n in (name, f"{name} on one device")
        )
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            same(saved[part], one_device[part])
    loaded = Mlp.load_from_checkpoint(tmp_path / "two" / "epoch=2.ckpt")
    same(dict(loaded.state_dict()), expected[2]["state_dict"])
