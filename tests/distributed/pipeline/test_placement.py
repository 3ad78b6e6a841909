"""Tensors are where their stages are, and no rank holds more than its own stage and what it has just borrowed."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from torch import Tensor, nn

from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.distributed.pipeline.chain import Chain
from lightning_hetero.distributed.pipeline.layer_profile import LayerProfile, profile_layers
from lightning_hetero.distributed.pipeline.moving import state_on
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.distributed.pipeline.structure import Call

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


# ---- what is borrowed ------------------------------------------------------------------------------------------------


@contextmanager
def ledger(owner: Callable[[], Any]) -> Iterator[list[int]]:
    """Note at each broadcast how many tensors are alive that were broadcast for another ``owner`` before."""
    borrowed: list[tuple[Any, weakref.ref[Tensor]]] = []
    alive: list[int] = []
    broadcast = dist.broadcast

    def noting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        now = owner()
        deadline = time.monotonic() + 5.0  # a thread of gloo may hold a tensor for a moment
        while True:
            others = sum(whose != now and ref() is not None for whose, ref in borrowed)
            if not others or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        alive.append(others)
        borrowed.append((now, weakref.ref(tensor)))
        return broadcast(tensor, *args, **kwargs)

    gc.collect()
    gc.disable()  # nothing may wait for it
    dist.broadcast = noting
    try:
        yield alive
    finally:
        dist.broadcast = broadcast
        gc.enable()


def completed() -> tuple[list[int], bool]:
    module = model()
    expected = [parameter.detach().clone() for parameter in module.parameters()]
    placement = TensorPlacement(module, list(module), StagePlan((1, 0), (1, 4)), CPU)
    with ledger(object) as alive:
        placement.complete()
    return alive, all(torch.equal(a, b) for a, b in zip(module.parameters(), expected, strict=True))


def test_completing_a_model_borrows_one_tensor_at_a_time(ranks: RankPools) -> None:
    for alive, complete in ranks.run(2, completed, timeout_s=100.0):
        assert alive == [0] * 8
        assert complete


def profiled(width: int, autocast: bool) -> tuple[list[int], LayerProfile]:
    module = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
    layers = list(module)
    placement = TensorPlacement(module, layers, StagePlan((1, 0), (1, 3)), CPU)
    number = -1
    borrow = placement.broadcast_layer

    def noting(layer: int) -> dict[str, Tensor]:
        nonlocal number
        number = layer
        return borrow(layer)

    placement.broadcast_layer = noting  # type: ignore[method-assign, assignment]
    head = nn.Linear(width, width) if dist.get_rank() == 0 else None

    def loss(output: Any) -> Tensor:
        assert head is not None
        return head(output).square().mean()  # type: ignore[no-any-return]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), ledger(lambda: number) as alive:
        profile = profile_layers(placement, Chain(layers), Call((torch.ones(2, width),)), loss if head else None, CPU)
    placement.complete()
    return alive, profile


@pytest.mark.parametrize("autocast", [False, True])
def test_a_profile_borrows_one_layer_and_counts_casts_once(ranks: RankPools, autocast: bool) -> None:
    """Autocast keeps the cast of a parameter for all micro-batches, so it is no activation."""
    width, samples = 256, 2
    of_input = samples * width * (2 if autocast else 4)
    cast = width * width * 2 if autocast else 0
    for rank, (alive, profile) in enumerate(ranks.run(2, profiled, width, autocast, timeout_s=100.0)):
        assert alive == [0] * 6
        assert LayerProfile.from_numbers(profile.to_numbers()) == profile
        assert profile.boundary_bytes == (of_input,) * 3
        assert profile.parameter_bytes == (4 * (width * width + width),) * 3
        activations, constants = list(profile.activations_bytes), list(profile.constant_bytes)
        if rank == 0:  # the head and its loss
            assert of_input <= activations[2] - activations[1] <= 4 * of_input
            assert 0 <= constants[2] - constants[1] - (cast or 4 * width * width) <= 4 * width
        else:
            assert (activations[2], constants[2]) == (of_input, cast)
        # the input of the first layer needs no gradient, so its backward pass does not need the weight
        assert activations[:2] == [of_input, of_input]
        assert constants[:2] == [0, cast]


# ---- what moves ------------------------------------------------------------------------------------------------------


def moved_with_belongings() -> list[bool]:
    """Move a layer from rank 1 to rank 0 with a gradient, and with states that are strided, shared and nested."""
    module: Any = model()
    layers: list[Any] = list(module)
    placement = TensorPlacement(module, layers, StagePlan((1, 0), (2, 4)), CPU)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    weight, bias = layers[1].weight, layers[1].bias
    if dist.get_rank() == 1:
        weight.grad = torch.arange(9.0).reshape(3, 3)
        shared = torch.arange(6.0).reshape(2, 3).T
        optimizer.state[weight] = {"a": shared, "b": [shared, 1], "of": weight, "sparse": torch.eye(3).to_sparse()}
        optimizer.state[bias] = {"step": torch.tensor(3.0), "empty": torch.empty(0), "half": torch.ones(2).bfloat16()}
        module[0].weight.grad = torch.ones(3, 3)
    placement.move(StagePlan((1, 0), (1, 4)), [optimizer])
    if dist.get_rank() == 1:
        return [weight.is_meta, weight not in optimizer.state, not module[0].weight.is_meta, weight.grad is None]
    kept, others = optimizer.state[weight], optimizer.state[bias]
    return [
        weight.grad is not None and torch.equal(weight.grad, torch.arange(9.0).reshape(3, 3)),
        bias.grad is None,
        torch.equal(kept["a"], torch.arange(6.0).reshape(2, 3).T),
        kept["a"].stride() == (1, 3),
        kept["b"][0] is kept["a"],
        kept["b"][1] == 1,
        kept["of"] is weight,
        torch.equal(kept["sparse"].to_dense(), torch.eye(3)),
        others["step"] == 3.0,
        others["empty"].shape == (0,),
        others["half"].dtype is torch.bfloat16,
    ]


def test_gradients_and_states_of_any_form_move(ranks: RankPools) -> None:
    for checks in ranks.run(2, moved_with_belongings, timeout_s=60.0):
        assert all(checks), checks


class Replacing(nn.Module):
    """Has a buffer that its steps replace."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))


def replaced() -> list[Any]:
    module: Any = nn.Sequential(Replacing(), nn.Linear(2, 2), nn.Linear(2, 2))
    placement = TensorPlacement(module, list(module), StagePlan((1, 0), (2, 3)), CPU)
    if dist.get_rank() == 1:
        module[0].seen = torch.ones(2)
    with placement.whole(gradients=False):
        found = [float(module[1].weight.sum())]
    placement.move(StagePlan((1, 0), (1, 3)), [])
    if dist.get_rank() == 1:
        module[0].seen = 2 * torch.ones(2)
    placement.complete()
    return [*found, module[0].seen.tolist()]


def test_a_buffer_that_was_replaced_belongs_to_the_rank_of_its_layer(ranks: RankPools) -> None:
    first, second = ranks.run(2, replaced, timeout_s=60.0)
    assert first == second
    assert first[-1] == [2.0, 2.0]
