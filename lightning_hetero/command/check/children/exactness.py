"""Compare trainings under hetero_ddp with the same under ddp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.children.trainings import FEATURES, Small, largest_difference, loader, numbers_of
from lightning_hetero.command.check.finding import Finding, at_most, failed

__all__ = ["exact", "shards", "synchronised_batch_norm"]

_TOLERANCE = 1e-10  # float64; only the order of sums differs
_TOLERANCE_OF_FLOAT32 = 1e-4
_TOLERANCE_OF_BF16 = 0.02  # it has eight bits
_BATCH_SIZE = 12  # per rank
_BATCHES = 8  # per epoch
_STEPS = 20


def exact(rank: Rank) -> Finding:
    """Train in float64 under both strategies, with unequal shares, in one and in several micro-batches."""
    shares = [1.0 + 2 * number for number in range(rank.ranks)]
    expected = _trained(rank, rank.ddp())
    whole = largest_difference(_trained(rank, rank.hetero(shares=shares)), expected)
    cut = largest_difference(_trained(rank, rank.hetero(shares=shares, micro_batch_size=5)), expected)
    note = f"largest difference of a parameter from ddp after {_STEPS} steps"
    return at_most(_TOLERANCE, max(whole, cut), "", note, whole=whole, micro_batches=cut)


def _trained(rank: Rank, strategy: DDPStrategy) -> Tensor:
    module = Small(torch.float64)
    size = _BATCH_SIZE * rank.ranks * _BATCHES
    rank.trainer(strategy, max_steps=_STEPS).fit(module, loader(_BATCH_SIZE, size, torch.float64, shuffle=True))
    return numbers_of(module)


def shards(rank: Rank) -> Finding:
    """Train with shards of unequal size and without, clip by norm, and compare what both have saved."""
    shares = [1.0 + 2 * number for number in range(rank.ranks)]
    weights = [float(rank.ranks - number) for number in range(rank.ranks)]
    saved = []
    for name, strategy in (
        ("whole", rank.hetero(shares=shares)),
        ("shards", rank.fsdp(shares=shares, shard_weights=weights)),
    ):
        module = Small(torch.float64, layers=[nn.Linear(FEATURES, 8), *_layers(), nn.Linear(8, 1)], adaptive=True)
        trainer = rank.trainer(strategy, max_steps=_STEPS, gradient_clip_val=0.5)
        trainer.fit(module, loader(_BATCH_SIZE, _BATCH_SIZE * rank.ranks * _BATCHES, torch.float64, shuffle=True))
        path = Path(rank.folder, f"{name}.ckpt")
        trainer.save_checkpoint(path)
        saved.append(_numbers_in(path))
    note = f"largest difference of a parameter or of an optimiser's state from hetero_ddp after {_STEPS} steps"
    return at_most(_TOLERANCE, largest_difference(*saved), "", note)


def _layers() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]


def _numbers_in(path: Path) -> Tensor:
    checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    states = [state for optimizer in checkpoint["optimizer_states"] for state in optimizer["state"].values()]
    tensors = [*checkpoint["state_dict"].values(), *(value for state in states for value in state.values())]
    return torch.cat([tensor.double().flatten() for tensor in tensors])


class _Samples(Callback):
    """Keeps the number of samples of each step."""

    def __init__(self) -> None:
        self.of_steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, HeteroDDPStrategy) and strategy.training_slice is not None:
            self.of_steps.append(strategy.training_slice.samples)


def synchronised_batch_norm(rank: Rank) -> Finding:
    """Train with last batches of a sample per rank, all of which one rank gets under hetero_ddp."""
    differences: dict[str, float] = {}
    for precision in ("32-true", "bf16-mixed"):
        samples, results = _Samples(), []
        for strategy in (rank.ddp(), rank.hetero(shares=[1.0] * rank.ranks)):
            module = Small(layers=[nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)])
            settings: dict[str, Any] = {"sync_batchnorm": True, "precision": precision, "max_epochs": 4}
            trainer = rank.trainer(strategy, [samples], **settings)
            trainer.fit(module, loader(_BATCH_SIZE, (2 * _BATCH_SIZE + 1) * rank.ranks))
            results.append(numbers_of(module))
        if min(rank.gather(min(samples.of_steps))) > 0:
            return failed("no rank was without samples in the last batch of an epoch")
        differences[precision] = largest_difference(*results)
    note = f"largest difference of a number from ddp in bf16, {differences['32-true']:.1e} in float32"
    finding = at_most(_TOLERANCE_OF_BF16, differences["bf16-mixed"], "", note, **differences)
    return finding if differences["32-true"] <= _TOLERANCE_OF_FLOAT32 else replace(finding, outcome="FAIL")
