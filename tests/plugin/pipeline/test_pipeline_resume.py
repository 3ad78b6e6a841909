"""A pipeline that is resumed within an epoch trains on the samples that an undisturbed run would have gone on with."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from training import Numbered, loss_of, make_trainer, small_network

from lightning_hetero import HeteroPipelineStrategy

SIZE, BATCH, SAVED, STEPS = 46, 12, 6, 11  # four steps an epoch: saved in the middle of the second, ended in the third


class DrawnByNumpy(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(SIZE).tolist())

    def __len__(self) -> int:
        return SIZE


class Stream(IterableDataset[Any]):
    """Has no length, so that Lightning reads a batch ahead."""

    def __iter__(self) -> Iterator[Any]:
        order = list(range(SIZE))
        random.shuffle(order)
        data = Numbered(SIZE)
        return (data[index] for index in order)


class Slow(Dataset[Any]):
    """Notes what was loaded."""

    def __init__(self) -> None:
        self.data = Numbered(SIZE)
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        self.loaded.append(index)
        return self.data[index]


def loaders_of(kind: str) -> Any:
    data = Numbered(SIZE)
    if kind == "in order":
        return DataLoader(data, BATCH)
    if kind == "own generator":
        return DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(5))
    if kind == "drawn by numpy":
        return DataLoader(data, BATCH, sampler=DrawnByNumpy())
    if kind == "workers that stay":
        return DataLoader(data, BATCH, shuffle=True, num_workers=1, persistent_workers=True)
    if kind == "stream":
        return DataLoader(Stream(), BATCH)
    if kind.startswith("two"):
        # every batch is whole, since parts of a step have as many samples of each loader
        loaders = {"long": DataLoader(Numbered(48), BATCH, shuffle=True)}
        loaders["short"] = DataLoader(Numbered(36), BATCH, shuffle=True)
        return CombinedLoader(loaders, "max_size_cycle" if kind == "two in a cycle" else "max_size")
    return DataLoader(Slow(), BATCH, shuffle=True)


KINDS = [
    "in order", "shuffled", "own generator", "drawn by numpy", "workers that stay", "stream", "two in a cycle",
    "two, one of which ends",
]  # fmt: skip


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_network()
        self.ledger: list[list[int]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        parts = [batch] if isinstance(batch, list | tuple) else [part for part in batch.values() if part is not None]
        self.ledger.append([int(index) for part in parts for index in part[0]])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, list | tuple):
            return loss_of(self.model, batch[1], batch[2])
        features, targets = (torch.cat([part[i] for part in batch.values() if part is not None]) for i in (1, 2))
        return loss_of(self.model, features, targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.model, batch[1], batch[2]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Found:
    ledger: list[list[int]]
    loaded: list[int]
    parameters: Tensor
    warned: list[str]


def train(kind: str, splits: list[int] | None, folder: Path, steps: int, resume: Path | None, seed: int) -> Found:
    callbacks: list[Callback] = [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=SAVED)]
    options: dict[str, Any] = {
        "max_steps": steps, "limit_val_batches": None, "enable_checkpointing": True, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    if splits is None:
        trainer = Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **options)
    else:
        strategy = HeteroPipelineStrategy(splits=splits)
        trainer = make_trainer(strategy, len(splits) + 1, callbacks, **options)
    for set_seed in (torch.manual_seed, np.random.seed, random.seed):
        set_seed(seed)
    model, loaders = Plain(), loaders_of(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loaders, DataLoader(Numbered(20), 5), ckpt_path=resume)
    dataset = getattr(loaders, "dataset", None)
    return Found(
        model.ledger,
        dataset.loaded if isinstance(dataset, Slow) else [],
        torch.cat([p.detach().flatten() for p in model.parameters()]),
        [str(one.message) for one in caught if "epoch" in str(one.message)],
    )


def checkpoint_of(folder: Path) -> Path:
    return folder / f"step={SAVED}.ckpt"


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_with_the_samples_of_an_undisturbed_run(ranks: RankPools, tmp_path: Path, kind: str) -> None:
    undisturbed = train(kind, None, tmp_path / "undisturbed", STEPS, None, seed=3)
    begun = ranks.run(2, train, kind, [2], tmp_path, SAVED, None, 3)
    assert begun[0].ledger == undisturbed.ledger[:SAVED]
    resumed = ranks.run(3, train, kind, [1, 2], tmp_path / "resumed", STEPS, checkpoint_of(tmp_path), 4)
    for found in resumed:
        assert found.ledger == undisturbed.ledger[SAVED:]
        assert torch.allclose(found.parameters, undisturbed.parameters, rtol=0, atol=1e-12)
        assert found.warned == []
    if kind == "shuffled":  # and nothing was loaded only to be discarded
        assert resumed[0].loaded == [index for step in undisturbed.ledger[SAVED:] for index in step]


@pytest.mark.parametrize(
    "damage", [None, "no mapping", 7, [], [{"pass": {"torch": "x"}, "now": None}], [{"pass": [1]}, {}]]
)
def test_it_says_so_where_the_order_is_not_known(ranks: RankPools, tmp_path: Path, damage: Any) -> None:
    ranks.run(2, train, "shuffled", [2], tmp_path, SAVED, None, 3)
    state = torch.load(checkpoint_of(tmp_path), weights_only=True)
    state["lightning_hetero"] = damage if isinstance(damage, str) else {"hetero_pipeline": damage}
    torch.save(state, checkpoint_of(tmp_path))
    first, second = ranks.run(2, train, "shuffled", [2], tmp_path / "resumed", STEPS, checkpoint_of(tmp_path), 4)
    assert len(first.ledger) == STEPS - SAVED
    assert first.ledger == second.ledger
    (warning,) = first.warned
    assert "does not hold the order of the epoch's samples: the remaining batches may repeat samples of" in warning
    assert second.warned == []
