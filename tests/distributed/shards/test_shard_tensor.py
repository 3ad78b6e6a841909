"""A tensor in parts gives what the whole one gives on one device, or raises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from torch import Tensor, nn

from lightning_hetero.distributed.shards.reductions import total_norm
from lightning_hetero.distributed.shards.released import become_released, become_whole
from lightning_hetero.distributed.shards.shard_tensor import Division, ShardTensor
from lightning_hetero.distributed.torch_private import version_of
from lightning_hetero.exceptions import UnsupportedFeatureError

SHAPE = (4, 3)
DIVISIONS = [(8, 4), (12, 0), (1, 11)]


def whole(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


def shard_of(tensor: Tensor, sizes: tuple[int, ...]) -> ShardTensor:
    division = Division(tuple(tensor.shape), sizes, dist.get_rank())
    return ShardTensor(division.part_of(tensor).clone(), division)


REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda t: t.norm(),
    "norm 1": lambda t: t.norm(1),
    "norm 3": lambda t: torch.linalg.vector_norm(t, 3),
    "norm 0": lambda t: torch.linalg.vector_norm(t, 0),
    "norm inf": lambda t: t.norm(float("inf")),
    "norm -inf": lambda t: t.norm(float("-inf")),
    "sum": lambda t: t.sum(),
    "mean": lambda t: t.mean(),
    "mean of squares": lambda t: (t**2).mean(),
    "max": lambda t: t.max(),
    "amin": lambda t: t.amin(),
    "any": lambda t: (t > 1).any(),
    "all": lambda t: torch.isfinite(t).all(),
    "count": lambda t: (t > 0).sum(),
    "item": lambda t: torch.tensor(t.abs().max().item()),
    "foreach": lambda t: torch.stack(torch._foreach_norm([t, 2 * t])),
    "dimensions": lambda t: torch.tensor([t.dim(), t.numel(), *t.shape]),
}
REFUSED: dict[str, Callable[[Any], Any]] = {
    "matmul": lambda t: t.T @ t,
    "norm of rows": lambda t: t.norm(dim=1),
    "mixed": lambda t: t + torch.ones(SHAPE, dtype=torch.float64),
    "into a whole one": lambda t: torch.ones(SHAPE, dtype=torch.float64).add_(t),
    "into a number": lambda t: torch.ones((), dtype=torch.float64).add_(t),
    "another shape": lambda t: t + shard_of(whole().view(12), t.division.sizes),
    "a row for all": lambda t: t.copy_(torch.ones(1, 3)),
    "foreach with whole ones": lambda t: torch._foreach_add([whole()], [t]),
    "norms of whole ones too": lambda t: torch._foreach_norm([t, whole()]),
    "hook after the gradient": lambda t: t.requires_grad_().register_post_accumulate_grad_hook(print),
    "copied into a whole one": lambda t: torch.ones(SHAPE, dtype=torch.float64).copy_(t),
    "view": lambda t: t.view(-1)[:3],
    "var": lambda t: t.var(),
    "linear": lambda t: nn.functional.linear(torch.ones(2, 3, dtype=torch.float64), t),
    "pickle": pickle.dumps,
    "hook": lambda t: t.requires_grad_().register_hook(print),
    "sort": lambda t: t.sort(),
    "another type": lambda t: setattr(t, "data", t.detach().float()),
    "in a backward pass": lambda t: (t.requires_grad_() ** 2).sum().backward(),
}


def results(sizes: tuple[int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, function in REDUCTIONS.items():
        found[name] = torch.equal(expected := function(whole()), got := function(shard_of(whole(), sizes))) or (
            type(got) is Tensor and torch.allclose(expected, got, rtol=1e-12, atol=0)
        )
    for name, function in REFUSED.items():
        try:
            function(shard_of(whole(), sizes))
        except UnsupportedFeatureError as error:  # noqa: PERF203
            found[name] = any(
                word in str(error) for word in ("hetero_ddp", "before the training")
            ) or "save_checkpoint" in str(error)
        else:
            found[name] = "was computed"
    shard = shard_of(whole(), sizes)
    found["full"] = torch.equal(shard.full_tensor(), whole())
    copied: Any = copy.deepcopy(nn.Parameter(shard))
    is_parameter = isinstance(copied, nn.Parameter)
    copied.data.mul_(2)
    found["deepcopy"] = is_parameter and torch.equal(copied.full_tensor(), 2 * whole())
    found["deepcopy is another"] = torch.equal(shard.full_tensor(), whole())
    of_state: Any = copy.deepcopy(shard_of(whole(), sizes).requires_grad_())
    found["deepcopy of what is no parameter"] = of_state.requires_grad and torch.equal(of_state.full_tensor(), whole())
    shard.copy_(torch.tensor(3.0))
    found["copy of a number"] = torch.equal(shard.full_tensor(), torch.full(SHAPE, 3.0, dtype=torch.float64))
    shard.copy_(whole(5))
    found["copy of a whole one"] = torch.equal(shard.full_tensor(), whole(5))
    held = shard.local
    shard.data = whole(6)  # as some averages of weights do
    found["data"] = torch.equal(shard.full_tensor(), whole(6)) and shard.local is held
    shard.data = shard.data * 2
    found["data of a part"] = torch.equal(shard.full_tensor(), 2 * whole(6))
    shard.data = whole(5)
    both = total_norm([shard, shard], torch.device("cpu"))
    found["total norm"] = torch.allclose(both, (2 * whole(5).square().sum()).sqrt(), rtol=1e-12)
    return found


def adam(parameter: Any, **options: Any) -> None:
    parameter.grad = shard_of(whole(2), parameter.division.sizes)
    torch.optim.AdamW([parameter], **options).step()


WRITES: dict[str, Callable[[Any], Any]] = {
    "one": lambda p: p.mul_(0.5),
    "of a list": lambda p: torch._foreach_add_([p], 1.0),
    "filled": lambda p: p.zero_(),
    "copied": lambda p: p.copy_(whole(3)),
    "copied from a part": lambda p: p.copy_(2 * p),
    "data": lambda p: setattr(p, "data", whole(4)),
    "of data": lambda p: p.data.add_(1),
    "initialised": nn.init.ones_,
    "by an optimiser": lambda p: adam(p, foreach=False),
    "by one of lists": lambda p: adam(p, foreach=True),
    "by a fused one": lambda p: adam(p, fused=True),
}


def writes_that_are_not_counted(sizes: tuple[int, int]) -> list[str]:
    missed = []
    for name, write in WRITES.items():
        division = Division(SHAPE, sizes, dist.get_rank())
        own = division.part_of(whole()).clone()
        parameter: Any = nn.Parameter(ShardTensor(own, division))
        before = version_of(own)
        with torch.no_grad():
            write(parameter)
        if version_of(own) == before:
            missed.append(name)
    return missed


def test_every_change_of_a_part_is_counted(ranks: RankPools) -> None:
    """A unit that is whole meanwhile is gathered again, and must not write over it."""
    assert ranks.run(2, writes_that_are_not_counted, (8, 4)) == [[], []]


def asked_while_released(sizes: tuple[int, int]) -> dict[str, Any]:
    """Ask a parameter object of the user, whose unit is released, as lists made before the training do."""
    leaf: Any = nn.Parameter(whole())
    part: Any = nn.Parameter(shard_of(whole(), sizes))
    become_released(leaf, part)
    found: dict[str, Any] = {
        "values": torch.equal(leaf.full_tensor(), whole()),
        "norm": torch.allclose(leaf.norm(), whole().norm()),
        "shape and device": (leaf.shape, leaf.device, leaf.is_leaf) == (part.shape, part.device, True),
        "gradient": leaf.grad is None,
    }
    part.grad = shard_of(whole(2), sizes)
    found["the gradient of its part"] = leaf.grad is part.grad
    copied: Any = copy.deepcopy(leaf)
    with torch.no_grad():
        leaf.mul_(2)
    found["written"] = torch.equal(part.detach().full_tensor(), 2 * whole())
    found["a copy is another"] = torch.equal(copied.full_tensor(), whole())
    found["a copy is a parameter"] = isinstance(copied, nn.Parameter)
    for name in ("pickle", "hook"):
        try:
            REFUSED[name](leaf)
        except UnsupportedFeatureError:  # noqa: PERF203
            found[name] = True
    become_whole(leaf)
    found["itself again"] = type(leaf) is nn.Parameter and torch.equal(leaf, whole())
    become_whole(leaf)
    return found


def test_a_released_parameter_answers_for_its_part(ranks: RankPools) -> None:
    for found in ranks.run(2, asked_while_released, (8, 4)):
        assert {name for name, right in found.items() if right is not True} == set()
        assert {"pickle", "hook"} <= found.keys()


@pytest.mark.parametrize("sizes", DIVISIONS)
def test_a_part_behaves_as_the_whole_or_raises(ranks: RankPools, sizes: tuple[int, int]) -> None:
    for rank, found in enumerate(ranks.run(2, results, sizes)):
        assert {name for name, right in found.items() if right is not True} == set(), rank


def trained(sizes: tuple[int, int] | None, optimizer: str, options: dict[str, Any], scaled: bool) -> Any:
    start = [whole(1), whole(2)]
    made = start if sizes is None else [shard_of(value, sizes) for value in start]
    parameters = [nn.Parameter(value.clone()) for value in made]
    optim = getattr(torch.optim, optimizer)(parameters, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    for step in range(4):
        for i, parameter in enumerate(parameters):
            gradient = whole(10 * step + i + 3)
            if step == 2 and scaled:
                gradient[0, 0] = float("inf")  # on one rank alone
            parameter.grad = gradient if sizes is None else shard_of(gradient, sizes)
        scaler.scale(torch.zeros(()))
        if scaled:
            scaler.unscale_(optim)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        nn.utils.clip_grad_value_(parameters, 0.3)
        scaler.step(optim)
        scaler.update()
    detached: list[Any] = [p.detach() for p in parameters]
    values = [p if sizes is None else p.full_tensor() for p in detached]
    return torch.stack(values), scaler.get_scale()


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    ("AdamW", {"lr": 0.1}),
    ("AdamW", {"lr": 0.1, "foreach": True, "amsgrad": True}),
    ("AdamW", {"lr": 0.1, "fused": True}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.1}),
    ("NAdam", {"lr": 0.1}),
    ("RMSprop", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1}),
    ("Adamax", {"lr": 0.1}),
    ("Adadelta", {"lr": 0.1}),
    ("RAdam", {"lr": 0.1}),
]


def trained_with_all(sizes: tuple[int, int]) -> list[tuple[str, float, bool]]:
    found = []
    for name, options in OPTIMIZERS:
        for scaled in (False, True):
            expected, scale = trained(None, name, options, scaled)
            got, got_scale = trained(sizes, name, options, scaled)
            found.append((f"{name} {options}", float((expected - got).abs().max()), scale == got_scale))
    expected, scale = trained(None, "AdamW", {"lr": 0.1}, True)
    got, got_scale = trained((12, 0), "AdamW", {"lr": 0.1}, True)  # a rank without a number scales and steps too
    found.append(("a rank without numbers", float((expected - got).abs().max()), scale == got_scale))
    return found


def test_optimisers_clipping_and_scalers_give_what_they_give_on_one_device(ranks: RankPools) -> None:
    for found in ranks.run(2, trained_with_all, (7, 5)):
        for name, difference, same_scale in found:
            assert difference < 1e-12, name
            assert same_scale, name


def complex_differences() -> list[float]:
    start = torch.complex(whole(1), whole(2))
    found = []
    for foreach in (False, True):
        plain, parts = nn.Parameter(start.clone()), nn.Parameter(shard_of(start, (7, 5)))
        for step in range(3):
            gradient = torch.complex(whole(10 + step), whole(20 + step))
            plain.grad, parts.grad = gradient, shard_of(gradient, (7, 5))
            for parameter in (plain, parts):
                optimizer = torch.optim.AdamW([parameter], lr=0.1, foreach=foreach)
                optimizer.step()
        held: Any = parts.detach()
        found.append(float((held.full_tensor() - plain.detach()).abs().max()))
    return found


def test_optimisers_take_complex_numbers_as_pairs(ranks: RankPools) -> None:
    for found in ranks.run(2, complex_differences):
        assert max(found) < 1e-12
