"""What plain DDP gets wrong silently is said once, with the way out; what is right is not warned of."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from training import Numbered, SmallModule, make_trainer

from lightning_hetero import HeteroDDPStrategy


def fit(
    module: LightningModule, data: Any, callbacks: list[Callback], strategy: Any = None, **trainer: Any
) -> list[str]:
    """Train for three epochs and return what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        settings = {"max_epochs": 3, "max_steps": -1, "limit_val_batches": 1.0} | trainer
        strategy = strategy or HeteroDDPStrategy(shares=[1, 3])
        fitted = make_trainer(strategy, dist.get_world_size(), callbacks, **settings)
        warnings.simplefilter("always")
        fitted.fit(module, data, DataLoader(Numbered(16), batch_size=4))
    return [str(w.message) for w in caught if "`hetero_ddp`:" in str(w.message)]


class Backbone(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 5).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0], self.backbone(batch[1]), batch[2]], batch_idx)


class FreezeLater(Callback):
    """Freezes once DDP has wrapped the module, and unfreezes."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.backbone.requires_grad_(trainer.current_epoch > 0)


def finetune() -> list[list[str]]:
    loader = DataLoader(Numbered(16), batch_size=4)
    unfreezing = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    unused = HeteroDDPStrategy(shares=[1, 3], find_unused_parameters=True)
    return [
        fit(Backbone(), loader, [unfreezing]),
        fit(Backbone(), loader, [FreezeLater()], unused),
        fit(Backbone(), loader, []),
    ]


def test_parameters_that_were_frozen_are_named(ranks: RankPools) -> None:
    (unfrozen, later, plain), *_ = ranks.run(2, finetune, timeout_s=90)
    (message,) = unfrozen
    assert "2 parameters (such as 'backbone.weight') are trained now" in message
    assert later == plain == []


class Monitored(SmallModule):
    def __init__(self, sync: bool, plateau: bool = False) -> None:
        super().__init__()
        self.sync, self.plateau = sync, plateau

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("watched", batch[1].mean(), sync_dist=self.sync)
        self.log("not watched", batch[1].mean())

    def on_validation_epoch_end(self) -> None:
        self.log("the same", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if not self.plateau:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": scheduler, "monitor": "watched"}]


class Watches(Callback):
    """Has something else under the name, and nothing yet under another."""

    def __init__(self) -> None:
        self.monitor = ["watched"]


def monitor(folder: str) -> list[list[str]]:
    loader = DataLoader(Numbered(16), batch_size=4)
    one_epoch: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": True}
    return [
        fit(Monitored(sync=False), loader, [EarlyStopping("watched", patience=9)]),
        fit(Monitored(sync=False), loader, [ModelCheckpoint(folder, monitor="watched")], **one_epoch),
        fit(Monitored(sync=False, plateau=True), loader, []),
        fit(Monitored(sync=True, plateau=True), loader, [EarlyStopping("watched", patience=9)]),
        fit(Monitored(sync=False), loader, [EarlyStopping("the same", patience=9)]),
        fit(Monitored(sync=False), loader, [Watches()]),
    ]


def test_monitored_values_that_differ_between_ranks_are_named(ranks: RankPools, tmp_path: Any) -> None:
    (early, saved, plateau, *right), *_ = ranks.run(2, monitor, str(tmp_path), timeout_s=90)
    for (message,) in (early, saved, plateau):
        assert "'watched' is monitored, but differs between ranks" in message
    assert right == [[], [], []]


class Texts(Dataset[Any]):
    """Sequences of several lengths, or of one."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        length = self.lengths[index % len(self.lengths)]
        tokens = torch.arange(8) % 3
        return tokens, torch.where(torch.arange(8) < length, tokens, -100)


class Tagger(LightningModule):
    def __init__(self, flat: bool = True) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 4), nn.Linear(4, 3)
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, targets = batch
        loss: Tensor = self.loss(self.head(self.embedding(tokens)).transpose(1, 2), targets)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def valid_tokens(batch: Any) -> int:
    return int((batch[1] >= 0).sum())


def tag() -> list[list[str]]:
    def loader(lengths: list[int]) -> Any:
        return DataLoader(Texts(lengths), batch_size=4)

    counted = HeteroDDPStrategy(shares=[1, 3], num_loss_terms=valid_tokens)
    return [
        fit(Tagger(), loader([3, 5, 8]), [], limit_val_batches=0),
        fit(Tagger(), loader([8]), [], limit_val_batches=0),
        fit(Tagger(), loader([3, 5, 8]), [], counted, limit_val_batches=0),
    ]


def test_means_over_tokens_are_named(ranks: RankPools) -> None:
    (masked, of_one_length, counted), *_ = ranks.run(2, tag, timeout_s=90)
    (message,) = masked
    assert "the loss looks like a mean over terms that are not the samples" in message
    assert "num_loss_terms" in message
    assert of_one_length == counted == []


class OfRank(Sampler[int]):
    """Divides the samples itself, and is divided again."""

    def __init__(self, by_rank: bool) -> None:
        self.by_rank = by_rank

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Any:
        first = 8 * dist.get_rank() if self.by_rank else 0
        return iter(range(first, first + 8))


class Seeded(OfRank):
    """Draws another order on each rank, of all samples."""

    def __iter__(self) -> Any:
        return iter(torch.randperm(8, generator=torch.Generator().manual_seed(dist.get_rank())).tolist())


def sample() -> list[list[str]]:
    return [
        fit(SmallModule(), DataLoader(Numbered(16), batch_size=2, sampler=sampler), [], limit_val_batches=0)
        for sampler in (OfRank(by_rank=True), OfRank(by_rank=False), Seeded(by_rank=False))
    ]


def test_samplers_that_divide_by_rank_are_named(ranks: RankPools) -> None:
    (divided, common, seeded), *_ = ranks.run(2, sample)
    (message,) = divided
    assert "the sampler 'OfRank' yields other samples on each rank" in message
    assert common == seeded == []
