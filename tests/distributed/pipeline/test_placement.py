"""Tensors are where their stages are, and no rank holds more than its own stage and what it has just borrowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import RankPools
from torch import nn

from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.distributed.pipeline.placement import TensorPlacement, state_on

CPU = torch.device("cpu")


# ---- what optimisers keep --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "step_moves"),
    [
        (torch.optim.Adam, {}, False),
        (torch.optim.Adam, {"foreach": True}, False),
        (torch.optim.Adam, {"fused": True}, True),
        (torch.optim.Adam, {"capturable": True}, True),
        (torch.optim.AdamW, {"fused": True, "amsgrad": True}, True),
        (torch.optim.Adagrad, {"fused": True}, True),
        (torch.optim.NAdam, {}, False),
        (torch.optim.ASGD, {}, False),
        (torch.optim.SGD, {"momentum": 0.9}, False),
    ],
)
def test_a_state_that_moves_is_where_torch_loads_it(kind: Any, options: dict[str, Any], step_moves: bool) -> None:
    """The device "meta" stands for an accelerator; torch would put a loaded state of the same optimiser there."""
    working = {name: value for name, value in options.items() if name != "capturable"}  # refused on processors
    source = nn.Parameter(torch.ones(3))
    optimizer = kind([source], **working)
    source.grad = torch.ones(3)
    optimizer.step()
    kept = optimizer.state_dict()

    target, other = nn.Parameter(torch.empty(3, device="meta")), nn.Parameter(torch.empty(1, device="meta"))
    loaded = kind([{"params": [other], "fused": False} if "fused" in options else {"params": [other]}])
    loaded.add_param_group({"params": [target], **options})
    moved = state_on(torch.device("meta"), target, dict(kept["state"][0]), loaded)
    assert moved.keys() == kept["state"][0].keys()

    reference = kind([target], **options)
    reference.load_state_dict({**kept, "param_groups": reference.state_dict()["param_groups"]})
    for name, value in reference.state[target].items():
        assert moved[name].device == value.device, name
        assert moved[name].dtype == value.dtype, name
    if "step" in moved:
        assert moved["step"].is_meta == step_moves


def test_nested_states_move() -> None:
    parameter = nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    state = {"factors": [torch.ones(2), {"step": torch.ones(()), "square": torch.ones(())}], "name": "x", "pair": (1,)}
    moved = state_on(torch.device("meta"), parameter, state, optimizer)
    assert moved["factors"][0].is_meta
    assert moved["factors"][1]["square"].is_meta
    assert not moved["factors"][1]["step"].is_meta
    assert (moved["name"], moved["pair"]) == ("x", (1,))


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, number + 1.0).cumsum(-1)
    optimizer.step()
    optimizer.zero_grad()


def move_while_training(fused: bool) -> float:
    """Return the largest difference from a training in which nothing moves."""
    expected = model()
    alone = torch.optim.Adam(expected.parameters(), fused=fused)
    module = model()
    plans = [StagePlan((1, 0), (1, 4)), StagePlan((1, 0), (3, 4)), StagePlan((1, 0), (2, 4))]
    placement = TensorPlacement(module, list(module), plans[0], CPU)
    optimizer = torch.optim.Adam(module.parameters(), fused=fused)
    for number in range(6):
        if number % 2 == 0 and number:
            placement.move(plans[number // 2], [optimizer])
        step(placement.parameters, optimizer, number)
        step(list(expected.parameters()), alone, number)
    placement.complete()
    pairs = zip(module.parameters(), expected.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("fused", [False, True])
def test_training_goes_on_after_a_move(ranks: RankPools, fused: bool) -> None:
    assert ranks.run(2, move_while_training, fused, timeout_s=60.0) == [0.0, 0.0]
