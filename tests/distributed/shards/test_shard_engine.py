"""Training with shards gives the parameters and states of one device, for every way of using parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from profiles import THOROUGH, drawn
from shard_models import MODELS, NOT_ALWAYS_USED, seeded
from torch import Tensor, nn

from lightning_hetero.distributed.shards.engine import ShardEngine
from lightning_hetero.distributed.shards.units import find_units

STEPS = drawn(5, 20)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def batch_of(step: int, samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, x.sum(dim=1, keepdim=True).sin()


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def on_one_device(name: str, optimizer: str, accumulate: int, clip: float, parts: list[int]) -> list[Tensor]:
    """Train on whole batches; a part of a batch is processed by itself, as on its rank."""
    model = seeded({**MODELS, **NOT_ALWAYS_USED}[name])
    optim = OPTIMIZERS[optimizer](model.parameters())
    for step in range(STEPS):
        optim.zero_grad()
        for i in range(accumulate):
            x, y = batch_of(step * accumulate + i)
            for part_x, part_y in zip(x.split(parts), y.split(parts), strict=True):
                if len(part_x):
                    (loss_of(model, part_x, part_y) * (len(part_x) / len(x) / accumulate)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            nn.utils.clip_grad_value_(model.parameters(), clip / 4)
        optim.step()
    return result_of(model, optim)


def result_of(model: nn.Module, optim: torch.optim.Optimizer) -> list[Tensor]:
    def whole(value: Any) -> Tensor:
        return value.full_tensor() if hasattr(value, "full_tensor") else value.detach()  # type: ignore[no-any-return]

    parameters = list(model.parameters())
    states = [v for p in parameters for v in optim.state.get(p, {}).values() if isinstance(v, Tensor) and v.dim()]
    return [whole(value).double().flatten() for value in [*parameters, *states]]


def on_ranks(
    name: str, optimizer: str, weights: list[float], parts: list[int], accumulate: int, clip: float, options: Any
) -> tuple[float, bool, int]:
    rank = dist.get_rank()
    model = seeded({**MODELS, **NOT_ALWAYS_USED}[name])
    if rank:  # the values of rank 0 hold
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    whole_sync = options.pop("accumulates_whole", False)
    engine = ShardEngine(model, find_units(model), weights, torch.device("cpu"), **options)
    optim = OPTIMIZERS[optimizer](model.parameters())
    for step in range(STEPS):
        optim.zero_grad()
        for i in range(accumulate):
            engine.reduces = not whole_sync or i == accumulate - 1
            x, y = (value.split(parts)[rank] for value in batch_of(step * accumulate + i))
            stands_in = not len(x)
            if stands_in:
                x, y = torch.ones(1, 5, dtype=torch.float64), torch.full((1, 1), float("inf"), dtype=torch.float64)
            with engine.step("train", backward_follows=True):
                loss = loss_of(model, x, y) * (0.0 if stands_in else dist.get_world_size() * len(x) / 8 / accumulate)
            with engine.backward(muted=stands_in):
                loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            nn.utils.clip_grad_value_(model.parameters(), clip / 4)
        optim.step()
    expected = on_one_device(name, optimizer, accumulate, clip, parts)
    found = result_of(model, optim)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True) if a.numel())
    parts_of: list[Any] = list(model.parameters())
    held = sum(p.local.numel() * p.element_size() for p in parts_of)
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    as_weights = abs(held / everything - weights[rank] / sum(weights)) < 0.01
    most = engine.most_whole_units
    engine.restore()
    restored = result_of(model, torch.optim.SGD(model.parameters()))
    difference = max(difference, *(float((a - b).abs().max()) for a, b in zip(expected, restored, strict=False)))
    engine.leave_group()
    return difference, as_weights, most


def many(cases: list[tuple[Any, ...]]) -> list[tuple[str, float, bool, int]]:
    found = []
    for name, *rest in cases:
        try:
            found.append((f"{name} {rest}", *on_ranks(name, *rest)))
        except Exception as error:  # noqa: PERF203
            raise RuntimeError(f"{name} {rest}") from error
    return found


def check(found: list[list[tuple[str, float, bool, int]]]) -> None:
    for of_rank in found:
        for case, difference, as_weights, most in of_rank:
            assert difference < (1e-7 if case.startswith("mixed types") else 1e-10), case
            assert as_weights, case
            assert most <= 2, case


@pytest.mark.parametrize(
    ("weights", "parts"), [([2.0, 1.0], [3, 5]), ([3.0, 1.0, 1.0], [1, 3, 4]), ([1.0, 0.0], [8, 0])]
)
def test_every_way_of_using_parameters(ranks: RankPools, weights: list[float], parts: list[int]) -> None:
    cases: list[tuple[Any, ...]] = []
    for number, name in enumerate(MODELS):
        if (number + len(weights) + int(weights[0])) % 3 and not THOROUGH:
            continue
        options: dict[str, Any] = {"find_unused_parameters": number % 4 == 3}
        # SGD too, because AdamW alone would hide a gradient of the wrong size
        for optimizer in OPTIMIZERS if THOROUGH else [[*OPTIMIZERS][(number // 2 + (weights == [2.0, 1.0])) % 2]]:
            accumulate, clip = (2, 0.5) if optimizer == "SGD" else (1, 0.0)
            cases.append((name, optimizer, weights, parts, accumulate, clip, options))
    check(ranks.run(len(weights), many, cases))


def test_parameters_that_some_ranks_do_not_use(ranks: RankPools) -> None:
    cases = [
        (name, optimizer, [2.0, 1.0], parts, 1, clip, {"find_unused_parameters": True})
        for name in NOT_ALWAYS_USED
        for optimizer, parts, clip in [("AdamW", [3, 5], 0.0), ("SGD", [8, 0], 0.5)]
    ]
    check(ranks.run(2, many, cases))


def test_gradients_that_stay_whole_between_micro_batches(ranks: RankPools) -> None:
    cases: list[tuple[Any, ...]] = [
        (name, "AdamW", [2.0, 1.0], [3, 5], 3, 0.5, {"accumulates_whole": True}) for name in ("plain", "tied", "frozen")
    ]
    check(ranks.run(2, many, cases))


def recorded_step() -> tuple[list[str], list[int]]:
    """Return what happens in the second step, in its order, and how often the ranks agree on something in each step."""
    model: Any = seeded(MODELS["plain"])
    engine = ShardEngine(model, find_units(model), [2.0, 1.0], torch.device("cpu"))
    events: list[str] = []

    def note(unit: Any, method: str, name: str) -> None:
        original = getattr(unit, method)

        def noted(*args: Any, **kwargs: Any) -> Any:
            events.append(f"{name} {unit.number}")
            return original(*args, **kwargs)

        setattr(unit, method, noted)

    for unit in engine.units[1:]:
        note(unit, "start_gathering", "gather")
        note(unit, "release", "release")
        block: Any = unit.module
        block.up.register_forward_hook(lambda *_, n=unit.number: events.append(f"use {n}"))
    start = engine.start_reduce

    def start_reduce(unit: int) -> None:
        events.append(f"reduce {unit}")
        start(unit)

    engine.start_reduce = start_reduce  # type: ignore[method-assign]
    agreements = []
    for step in range(2):
        events.clear()
        x, y = batch_of(step)
        with (
            mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as told,
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as agreed,
        ):
            with engine.step("train", backward_follows=True):
                loss = loss_of(model, x, y)
            events.append("backward")
            with engine.backward():
                loss.backward()
        agreements.append(told.call_count + agreed.call_count)
    engine.leave_group()
    return events, agreements


def test_transfers_are_under_way_while_units_are_used(ranks: RankPools) -> None:
    expected = "gather 1, gather 2, use 1, release 1, gather 3, use 2, release 2, use 3, release 3, backward, gather 3"
    for events, (first, later) in ranks.run(2, recorded_step):
        assert first > 0
        assert later == 0  # an ordinary step exchanges parameters and gradients, and nothing else
        forward = [event for event in events if not event.startswith("reduce 0")]
        assert ", ".join(forward[:11]) == expected
        backward = forward[10:]
        for unit in (3, 2):  # the one before is gathered while this one is used, and its own gradients are reduced then
            assert backward.index(f"gather {unit - 1}") < backward.index(f"reduce {unit}")
        assert backward.index("reduce 3") < backward.index("reduce 2") < backward.index("reduce 1")
