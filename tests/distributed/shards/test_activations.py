"""What a forward pass keeps is counted without computing anything, and without a change of the module."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # torch imports it for operators on the meta device, and it sets an environment variable
from torch import Tensor, nn

from lightning_hetero.distributed.shards.activations import activations_of_example


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 1))


def really_saved(module: nn.Module, x: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("make", "shape"), [(net, (8, 10)), (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish()), (4, 3, 9, 9))]
)
def test_they_are_those_of_a_real_pass(make: Any, shape: tuple[int, ...]) -> None:
    module, x = make(), torch.randn(shape)
    assert activations_of_example(module, x) == (really_saved(module, x), shape[0])


class Drawing(nn.Module):
    """Draws random numbers of all kinds."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(1).item() + random.random() + float(np.random.rand()))


def test_the_module_and_random_numbers_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(10, 20), Drawing(), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state, of_python = torch.get_rng_state(), random.getstate()
    of_numpy: Any = np.random.get_state()
    found = activations_of_example(module, (torch.randn(8, 10, generator=torch.Generator()),))
    assert found is not None
    assert found[0] > 8 * 4 * (10 + 20 + 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == of_python
    now: Any = np.random.get_state()
    assert now[1].tolist() == of_numpy[1].tolist()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(value.is_meta for value in module.state_dict().values())


def test_a_model_on_the_meta_device_is_counted() -> None:
    with torch.device("meta"):
        module = net()
    assert activations_of_example(module, torch.randn(8, 10)) == activations_of_example(net(), torch.randn(8, 10))


class Branching(nn.Module):
    """Looks at values, which the meta device has not."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(("module", "example"), [(Branching(), torch.ones(2, 2)), (net(), "text"), (net(), None)])
def test_what_cannot_be_counted_is_unknown(module: nn.Module, example: Any) -> None:
    assert activations_of_example(module, example) is None


def test_named_arguments() -> None:
    module = net()
    assert activations_of_example(module, {"input": torch.ones(2, 10)}) == activations_of_example(
        module, torch.ones(2, 10)
    )
