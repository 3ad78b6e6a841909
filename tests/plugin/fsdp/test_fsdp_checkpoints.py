"""A checkpoint of one strategy, with its weights and its number of ranks, is resumed by every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import RankPools
from lightning.pytorch import LightningModule
from profiles import THOROUGH
from shard_models import Plain, Tied, seeded
from shard_trainings import Module
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from training import SEED, Numbered, assert_close, make_trainer

from lightning_hetero import HeteroDDPStrategy, HeteroFSDPStrategy

SIZE, GLOBAL_BATCH = 36, 12


class Saved(Module):
    """Keeps a state of its own in the checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["mine"] == 7


def run(strategy: Any, ranks: int, path: str, epoch: int, optimizer: str, *rest: str) -> tuple[list[float], list[str]]:
    """Train until an epoch has ended, from a checkpoint if there are more arguments, and save to ``path``.

    Return all parameters and states of the optimiser.
    """
    trainer = make_trainer(strategy, ranks, max_epochs=epoch + 1)
    module = Saved(seeded(Tied if optimizer == "AdamW" else Plain), optimizer)
    data = Numbered(SIZE)
    # what Lightning gives several ranks
    sampler: Any = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=SEED) if ranks == 1 else None
    loader = DataLoader(data, GLOBAL_BATCH // ranks, shuffle=None if sampler else True, sampler=sampler)
    trainer.fit(module, loader, ckpt_path=path if rest else None)
    trainer.save_checkpoint(path)
    if not trainer.is_global_zero:
        return [], []
    checkpoint = torch.load(path, weights_only=False)
    states = [s for of_optimizer in checkpoint["optimizer_states"] for s in of_optimizer["state"].values()]
    tensors = [*checkpoint["state_dict"].values(), *(v for s in states for v in s.values())]
    assert all(type(t) is Tensor and t.device.type == "cpu" for t in tensors if isinstance(t, Tensor))
    module.load_state_dict(checkpoint["state_dict"])  # the module is whole again, and a plain one takes what was saved
    flat = [t.double().flatten() for t in tensors if isinstance(t, Tensor)]
    return torch.cat(flat).tolist(), list(checkpoint["state_dict"])


def test_checkpoints_pass_from_strategy_to_strategy(ranks: RankPools, tmp_path: Path) -> None:
    chain: list[tuple[Any, int]] = [
        ("auto", 1),
        (HeteroFSDPStrategy(shard_weights=[2, 1], shares=[3, 1]), 2),
        (HeteroFSDPStrategy(shard_weights=[3, 1, 1], shares=[1, 3, 2]), 3),
        (HeteroDDPStrategy(shares=[1, 3]), 2),
        (HeteroFSDPStrategy(shard_weights=[1, 0]), 2),
        ("ddp", 2),
        (HeteroFSDPStrategy(), 1),
        ("auto", 1),
    ]
    if not THOROUGH:  # without a rank that holds nothing, and a strategy with one rank
        chain = [entry for number, entry in enumerate(chain) if number not in (4, 6)]
    for optimizer in ("SGD", "AdamW") if THOROUGH else ("AdamW",):
        path, alone = str(tmp_path / "chain.ckpt"), str(tmp_path / "alone.ckpt")
        for epoch, (strategy, world_size) in enumerate(chain):
            resume = ["resumed"] if epoch else []
            found, names = ranks.run(world_size, run, strategy, world_size, path, epoch, optimizer, *resume)[0]
        expected, expected_names = ranks.run(1, run, "auto", 1, alone, len(chain) - 1, optimizer)[0]
        assert names == expected_names
        assert_close(found, expected, comparison=f"hetero_fsdp: checkpoints of {len(chain)} strategies, {optimizer}")


class Big(LightningModule):
    """Is created on the meta device by Lightning's hook for models that are too big."""

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            with torch.device("meta"):
                self.layers = nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)))
                self.last = nn.Linear(8, 1)
                self.last.bias = nn.Parameter(torch.empty(1, device="meta"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, x, y = batch
        return nn.functional.mse_loss(self.last(self.layers(x.float())), y.float())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def too_big(path: str) -> tuple[bool, list[float], list[float]]:
    module = Big()
    loader = DataLoader(Numbered(SIZE), batch_size=6)
    strategy = HeteroFSDPStrategy(shard_weights=[2, 1], shares=[3, 1])
    trainer = make_trainer(strategy, 2, max_epochs=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(path)
    again = Big()
    trainer = make_trainer(HeteroFSDPStrategy(shard_weights=[1, 3], shares=[3, 1]), 2, max_epochs=1)
    trainer.fit(again, loader, ckpt_path=path)  # nothing left to train: what is saved is what is loaded
    first, second = (torch.cat([p.detach().flatten() for p in m.parameters()]).tolist() for m in (module, again))
    return all(not p.is_meta for p in module.parameters()), first, second


def test_a_model_on_the_meta_device_is_made_and_loaded_part_by_part(ranks: RankPools, tmp_path: Path) -> None:
    first, second = ranks.run(2, too_big, str(tmp_path / "big.ckpt"))
    assert first[0]
    assert len(set(first[1])) > 10
    assert first[1] == second[1] == first[2] == second[2]
