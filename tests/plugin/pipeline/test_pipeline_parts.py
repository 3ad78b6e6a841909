"""Data that the user divides by rank: every sample once, or an error on all ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import LightningModule, Trainer
from profiles import THOROUGH
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    get_worker_info,
    random_split,
)
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.exceptions import UnsupportedFeatureError

SIZE = 40


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self.model(batch[0])[:, 0], batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Stream(IterableDataset[Any]):
    """Divides its samples by the rank that it asks for, and by worker; may claim another length."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def asked(self) -> tuple[int, int]:
        return rank_and_world_size()

    def __iter__(self) -> Iterator[Any]:
        rank, world_size = self.asked()
        worker = get_worker_info()
        if worker is not None:
            rank, world_size = rank * worker.num_workers + worker.id, world_size * worker.num_workers
        for i in range(rank, self.size, world_size):
            x = torch.sin(torch.arange(5.0, dtype=torch.float64) * (i + 1))
            yield x, (x.sum() > 0).double()


class OfVariables(Stream):
    """Divides its samples by what the launcher says, as webdataset does."""

    def asked(self) -> tuple[int, int]:
        return int(os.environ.get("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))


class SizedStream(Stream):
    def __init__(self, size: int, claimed: int) -> None:
        super().__init__(size)
        self.claimed = claimed

    def __len__(self) -> int:
        return self.claimed


class OwnSampler(Sampler[int]):
    def __init__(self) -> None:
        self.me, self.of = rank_and_world_size()

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.me, SIZE, self.of))

    def __len__(self) -> int:
        return SIZE // self.of


def data(kind: str) -> DataLoader[Any]:
    x = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = TensorDataset(x, (x.sum(1) > 0).double())
    rank, world_size = rank_and_world_size()
    part = SIZE // world_size
    makers: dict[str, Any] = {
        "a stream": lambda: DataLoader(Stream(), 8),
        "a stream with workers": lambda: DataLoader(Stream(), 8, num_workers=2),
        "variables": lambda: DataLoader(OfVariables(), 8),
        "variables, with workers": lambda: DataLoader(OfVariables(), 8, num_workers=2),
        "variables, in other processes": lambda: DataLoader(
            OfVariables(16), 8, num_workers=1, multiprocessing_context="spawn", persistent_workers=True
        ),
        "a stream that is shorter than it says": lambda: DataLoader(SizedStream(24, 64), 8),
        "a stream that is longer than it says": lambda: DataLoader(SizedStream(40, 24), 8),
        "a sampler for one rank": lambda: DataLoader(samples, 8, sampler=DistributedSampler(samples, 1, 0)),
        "a random part": lambda: DataLoader(random_split(samples, [30, 10])[0], 8, shuffle=True),
        "DistributedSampler": lambda: DataLoader(samples, 8, sampler=DistributedSampler(samples, world_size, rank)),
        "OwnSampler": lambda: DataLoader(samples, 8, sampler=OwnSampler()),
        "Subset": lambda: DataLoader(Subset(samples, range(rank, SIZE, world_size)), 8),
        "Subset ": lambda: DataLoader(Subset(samples, [*range(rank * part, (rank + 1) * part)]), 8),
    }
    loader: DataLoader[Any] = makers[kind]()
    return loader


TRAINED = [
    "a stream", "a stream with workers", "a stream that is shorter than it says",
    "a stream that is longer than it says", "a sampler for one rank", "a random part",
    "variables", "variables, with workers",
] + ["variables, in other processes"] * THOROUGH  # fmt: skip
REFUSED = ["DistributedSampler", "OwnSampler", "Subset", "Subset "]


def train_on(kinds: list[str]) -> list[Any]:
    found: list[Any] = []
    options: dict[str, Any] = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "max_epochs": 2, "limit_val_batches": 0,
    }  # fmt: skip
    for kind in kinds:
        if dist.is_initialized():  # as under torchrun; Lightning deletes one of them when a run ends
            os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
        trainer: Trainer
        if "LOCAL_RANK" in os.environ:
            trainer = make_trainer(HeteroPipelineStrategy(splits=[3], num_microbatches=2), 2, **options)
        else:
            trainer = Trainer(accelerator="cpu", devices=1, **options)
        torch.manual_seed(0)
        module = Plain()
        with pytest.raises(UnsupportedFeatureError) if kind in REFUSED else nullcontext() as caught:
            trainer.fit(module, data(kind))
        if caught is None:
            found.append(torch.cat([p.detach().flatten() for p in module.parameters()]).tolist())
        else:
            found.append(str(caught.value))
    if dist.is_initialized():
        assert os.environ.pop("RANK") == str(dist.get_rank())
    return found


def test_every_sample_is_seen_once(ranks: RankPools) -> None:
    expected = train_on(TRAINED)
    for found in ranks.run(2, train_on, TRAINED, timeout_s=60):
        for kind, parameters, own in zip(TRAINED, expected, found, strict=True):
            assert own == pytest.approx(parameters, abs=1e-10), kind


def test_parts_that_are_fixed_are_refused_on_all_ranks(ranks: RankPools) -> None:
    for found in ranks.run(2, train_on, REFUSED, timeout_s=60):
        for kind, message in zip(REFUSED, found, strict=True):
            assert f"data must not be divided by rank, got {kind.strip()!r}" in message
