"""Trainings with shards, and their comparison with `hetero_ddp`: parameters, states, and what is logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from profiles import drawn
from shard_models import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import Numbered, make_trainer

from lightning_hetero import HeteroDDPStrategy, HeteroFSDPStrategy

SIZE, BATCH, STEPS = 37, 4, drawn(6, 20)  # the last batch of an epoch, which has five, is ragged


class Module(LightningModule):
    """Trains one of the models."""

    def __init__(self, model: nn.Module, optimizer: str = "AdamW") -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.norms: list[float] = []

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def step(self, batch: Any) -> Tensor:
        _, x, y = batch
        # infinite where a rank has no sample: a stand-in repeats sample 0 or others, and counts for nothing
        return nn.functional.mse_loss(self(x.to(self.model_dtype)), y.to(self.model_dtype))

    @property
    def model_dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.step(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None])
        self.norms.append(float(norms.norm()))

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        if self.optimizer == "SGD":
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return torch.optim.AdamW(groups, lr=0.01)


class InfiniteStandIn(Module):
    """Its loss is not finite where a rank has no sample."""

    def step(self, batch: Any) -> Tensor:
        loss = super().step(batch)
        strategy: Any = self.trainer.strategy
        return loss * float("inf") if self.trainer.training and strategy.training_slice.samples == 0 else loss


class Manual(Module):
    """Two optimisers that take turns, each with a backward pass of its own."""

    def __init__(self, model: nn.Module, optimizer: str = "AdamW") -> None:
        super().__init__(model, optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for number, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = self.step(batch) * (number + 1)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        first = [p for name, p in self.named_parameters() if "blocks" in name]
        second = [p for name, p in self.named_parameters() if "blocks" not in name]
        return [torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.AdamW(second, lr=0.01)]


Kind = Callable[..., Module]


def fit(strategy: Any, module: LightningModule, world_size: int, **options: Any) -> dict[str, Any]:
    batch_size = options.pop("batch_size", BATCH)
    trainer = make_trainer(strategy, world_size, **{"max_steps": STEPS, "limit_val_batches": 2, **options})
    loader = DataLoader(Numbered(SIZE), batch_size=batch_size, shuffle=True)
    states: dict[str, Any] = {}

    original = module.on_train_end

    def keep() -> None:
        for number, optimizer in enumerate(trainer.optimizers):
            found: dict[str, Any] = trainer.strategy.optimizer_state(optimizer).get("state", {})  # type: ignore[assignment]
            for index, state in found.items():
                states.update({f"{number} {index} {k}": v for k, v in state.items() if isinstance(v, Tensor)})
        original()

    module.on_train_end = keep  # type: ignore[method-assign]
    trainer.fit(module, loader, DataLoader(Numbered(11), batch_size=2))
    parameters = {name: _wide(value.detach()) for name, value in module.state_dict().items()}
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {"parameters": parameters, "states": states, "logged": logged, "norms": getattr(module, "norms", [])}


def _wide(value: Tensor) -> Tensor:
    return value.cpu() if value.is_complex() else value.cpu().double()


def differences(
    kind: Kind, make: Callable[[], nn.Module], ddp: dict[str, Any], fsdp: dict[str, Any], world_size: int, options: Any
) -> dict[str, float]:
    made = options.pop("made", seeded)
    expected = fit(HeteroDDPStrategy(**ddp), kind(made(make)), world_size, **options)
    found = fit(HeteroFSDPStrategy(**ddp | fsdp), kind(made(make)), world_size, **options)
    if dist.get_rank() == 0:
        assert expected["states"].keys() == found["states"].keys()
    result = {}
    for name in ("parameters", "states", "logged"):
        pairs = [(value, found[name][key]) for key, value in expected[name].items() if key in found[name]]
        distances = [(_wide(torch.as_tensor(a)) - _wide(torch.as_tensor(b))).abs() for a, b in pairs]
        result[name] = max((float(distance.max()) for distance in distances if distance.numel()), default=0.0)
    assert expected["parameters"].keys() == found["parameters"].keys()
    assert len(expected["norms"]) == len(found["norms"])
    # a scaled loss may be infinite, in the first steps on a device
    norms = zip(expected["norms"], found["norms"], strict=True)
    result["norms"] = max((abs(a - b) for a, b in norms if math.isfinite(a) or math.isfinite(b)), default=0.0)
    return result


def check(found: list[list[tuple[str, dict[str, float]]]], tolerance: float = 1e-10) -> None:
    for rank, cases in enumerate(found):
        for name, differences in cases:
            for what, difference in differences.items():
                assert difference < tolerance, f"rank {rank}, {name}: {what} differ by {difference}"
