"""`hetero_fsdp` trains what `hetero_ddp` trains: parameters, states of the optimiser, and what is logged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import RankPools
from profiles import THOROUGH
from shard_models import MODELS, NOT_ALWAYS_USED, Block, Plain, seeded
from shard_trainings import InfiniteStandIn, Manual, Module, check, differences
from torch import Tensor, nn


class Normalised(Plain):
    """Batch normalisation in a unit and outside, whose statistics are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)))
        self.outer = nn.BatchNorm1d(6)

    def inner(self, x: Tensor) -> Tensor:
        return super().inner(self.outer(x))


class Penalised(Module):
    """Its loss holds gradients, whose gradients are computed."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, x, y = batch
        x = x.clone().requires_grad_()
        found = self(x)
        (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        return (found - y).square().mean() + gradient.square().mean()


class Adversarial(Module):
    """Computes gradients of its input before it computes those of the loss."""

    def step(self, batch: Any) -> Tensor:
        index, x, y = batch
        near = x.float().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self(near).float().sum(), near)
        return super().step((index, x + 0.1 * gradient.sign(), y))


class PastLightning(Manual):
    """Uses the model again after it has written parameters, and after steps of which Lightning does not tell."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        for optimizer in optimizers:
            with torch.no_grad():
                self.step(batch)
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(0.9)
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()
        self.log("loss", self.step(batch), sync_dist=True)


def all_differences(cases: list[tuple[Any, ...]]) -> list[tuple[str, dict[str, float]]]:
    found = []
    for name, *case in cases:
        try:
            found.append((name, differences(*case)))
        except Exception as error:  # noqa: PERF203
            raise RuntimeError(name) from error
    return found


SHARES = {"shares": [3, 1]}
TWO = {"shard_weights": [2, 1]}
MORE = (
    "accumulated whole",
    "clipped by value",
    "named units",
    "frozen",
    "not released",
)  # if there is time; drawn trainings have them


def test_two_ranks(ranks: RankPools) -> None:
    sgd, unused = partial(Module, optimizer="SGD"), {**SHARES, "find_unused_parameters": True}
    cases = [
        ("SGD, ragged end", sgd, Plain, SHARES, TWO, 2, {"max_steps": 20}),
        ("AdamW, infinite loss", InfiniteStandIn, Plain, SHARES, TWO, 2, {"batch_size": 9, "max_steps": 20}),
        ("no shard", sgd, Plain, SHARES, {"shard_weights": [1, 0]}, 2, {"gradient_clip_val": 0.3}),
        ("accumulated", sgd, Plain, SHARES, TWO, 2, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}),
        (
            "accumulated whole",
            Module,
            Plain,
            SHARES,
            {**TWO, "reduce_every_batch": False},
            2,
            {"accumulate_grad_batches": 3},
        ),
        (
            "clipped by value",
            sgd,
            Plain,
            SHARES,
            TWO,
            2,
            {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        ),
        ("not released", Module, MODELS["twice"], SHARES, {**TWO, "reshard_after_forward": False}, 2, {}),
        ("penalty", Penalised, Plain, SHARES, {**TWO, "reshard_after_forward": False}, 2, {}),
        ("named units", Module, MODELS["tied"], SHARES, {**TWO, "units": [Block]}, 2, {}),
        ("unused", sgd, NOT_ALWAYS_USED["unused"], unused, TWO, 2, {}),
        ("frozen", Module, MODELS["frozen"], SHARES, TWO, 2, {}),
        ("manual", Manual, Plain, {"find_unused_parameters": True, **SHARES}, TWO, 2, {"limit_val_batches": 0}),
        (
            "manual, past Lightning",
            PastLightning,
            Plain,
            {"find_unused_parameters": True, **SHARES},
            {**TWO, "reshard_after_forward": False},
            2,
            # Lightning does not count these steps
            {"limit_val_batches": 0, "max_steps": -1, "max_epochs": 1},
        ),
        ("batch normalisation", sgd, Normalised, SHARES, TWO, 2, {}),
    ]
    cases = [case for case in cases if THOROUGH or case[0] not in MORE]
    check(ranks.run(2, all_differences, cases, timeout_s=240.0))


def test_three_ranks(ranks: RankPools) -> None:
    shares, weights = {"shares": [1, 3, 2]}, {"shard_weights": [3, 1, 1]}
    cases = [
        (
            "SGD",
            partial(Module, optimizer="SGD"),
            MODELS["checkpointed"],
            shares,
            weights,
            3,
            {"gradient_clip_val": 0.3},
        ),
        ("AdamW, infinite loss", InfiniteStandIn, MODELS["recurrent"], shares, weights, 3, {"batch_size": 6}),
    ]
    check(ranks.run(3, all_differences, cases, timeout_s=240.0))


def single(make: Callable[[], nn.Module]) -> nn.Module:
    return seeded(make).float()


def test_other_precisions(ranks: RankPools) -> None:
    cases: list[tuple[Any, ...]] = [
        (precision, Module, Plain, SHARES, TWO, 2, {"precision": precision, "made": single, "gradient_clip_val": 0.3})
        for precision in (["32-true"] if THOROUGH else []) + ["bf16-mixed", "16-mixed"]
    ]
    # autograd looks at what autocast has made in passes of other kinds, too
    cases += [
        (name, kind, MODELS[model], SHARES, TWO, 2, {"precision": "bf16-mixed", "made": single})
        for name, kind, model in [
            ("mixed, twice", Module, "twice"),
            ("mixed, checkpointed", Module, "checkpointed"),
            ("mixed, adversarial", Adversarial, "plain"),
        ]
        if THOROUGH or kind is Adversarial
    ]
    check(ranks.run(2, all_differences, cases), tolerance=2e-3)
    cases = [("bf16-true", Module, Plain, SHARES, TWO, 2, {"precision": "bf16-true", "made": single})]
    check(ranks.run(2, all_differences, cases), tolerance=0.1)
