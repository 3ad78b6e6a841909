"""A small training whose every step can be repeated by hand, and the plain torch loop that does so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from differences import measured
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SEED = 7
FEATURES = 5
TOLERANCE = 1e-10  # of parameters in float64; only the order of sums differs


class Numbered(Dataset[tuple[int, Tensor, Tensor]]):
    """Samples that know their index: (index, features, target)."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.features = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64)
        self.targets = torch.randn(size, 1, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return index, self.features[index], self.targets[index]


def small_network() -> nn.Module:
    """Return a network of known weights in float64."""
    generator = torch.Generator().manual_seed(2)
    network = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return network


def loss_of(network: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error; uneven over samples, so a wrong weight shows."""
    return nn.functional.mse_loss(network(features), targets)


class SmallModule(LightningModule):
    """Knows nothing of this package; keeps a ledger of the samples that it saw in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()
        self.ledger: list[list[int]] = []
        self.evaluated: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, features, targets = batch
        self.ledger.append(index.tolist())
        loss = loss_of(self.network, features, targets)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        index, features, targets = batch
        self.evaluated.append(index.tolist())
        self.log("val_loss", loss_of(self.network, features, targets), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[0].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SaveAt(Callback):
    """Saves a checkpoint after a step, counted from 0 over all epochs."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.step:
            trainer.save_checkpoint(self.path)


def flat(module: nn.Module) -> list[float]:
    """Return all parameters as one list."""
    return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()


def largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the largest difference of two lists, NaN where one of them holds NaN and the other does not."""
    return float((torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)).abs().max())


def assert_close(
    found: Sequence[float], expected: Sequence[float], tolerance: float = TOLERANCE, *, comparison: str = ""
) -> None:
    """Fail where a number differs by ``tolerance`` or is NaN; keep the largest difference of a named comparison."""
    assert len(found) == len(expected)
    difference = largest_difference(found, expected)
    if comparison:
        measured(comparison, difference)
    if not difference < tolerance:
        differ = [(i, *pair) for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
        raise AssertionError(f"the largest difference is {difference}; at, found, expected: {differ[:12]}")


def reference_parameters(size: int, global_batch: int, steps: int, *, drop_last: bool = False) -> list[float]:
    """Train in this process on whole global batches with nothing but torch, and return the parameters."""
    data, network = Numbered(size), small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    order: DistributedSampler[Any] = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=SEED)
    done, epoch = 0, 0
    while done < steps:
        order.set_epoch(epoch)
        for _, features, targets in DataLoader(data, batch_size=global_batch, sampler=order, drop_last=drop_last):
            optimizer.zero_grad()
            loss_of(network, features, targets).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
        epoch += 1
    return flat(network)


def parameters_after(batches: Iterable[Sequence[int]], size: int) -> list[float]:
    """Train in this process on these samples of ``Numbered(size)``, batch after batch, and return the parameters."""
    data, network = Numbered(size), small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for indices in batches:
        optimizer.zero_grad()
        loss_of(network, data.features[list(indices)], data.targets[list(indices)]).backward()
        optimizer.step()
    return flat(network)


def reference_batches(size: int, global_batch: int, epochs: int) -> list[set[int]]:
    """Return the samples of each global batch, as sets."""
    data = Numbered(size)
    order: DistributedSampler[Any] = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=SEED)
    batches = []
    for epoch in range(epochs):
        order.set_epoch(epoch)
        indices = list(order)
        batches += [set(indices[i : i + global_batch]) for i in range(0, size, global_batch)]
    return batches


def make_trainer(
    strategy: DDPStrategy | str, world_size: int, callbacks: Sequence[Callback] = (), **kwargs: Any
) -> Trainer:
    """Return a quiet Trainer for the ranks of the harness."""
    import logging
    import os
    import warnings

    from lightning.pytorch import seed_everything

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(SEED, verbose=False)
    assert "LOCAL_RANK" in os.environ
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(
        devices=world_size,
        strategy=strategy,
        callbacks=list(callbacks),
        **(settings | kwargs),
    )
