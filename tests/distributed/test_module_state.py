"""What steps change in a module is found, and is the same on another rank afterwards."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.distributed.module_state import ModuleState


class Holder:
    def __init__(self) -> None:
        self.values: list[Any] = [1, {"a": torch.zeros(2)}]
        self.values.append(self)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("center", torch.zeros(2))
        self.number = 1
        self.losses: list[Any] = []
        self.counts: dict[str, int] = defaultdict(lambda: 0)
        self.array = np.zeros(3)
        self.tensor = torch.zeros(2)
        self.holder = Holder()
        self.layers = [self.layer, self.layer.weight]
        self.file = io.StringIO()
        self.function: Callable[[int], int] = lambda x: x + 1
        self.goes = True


def state_of(module: nn.Module) -> ModuleState:
    return ModuleState(module, torch.device("cpu"), dict, ["file_of_lightning"], lambda _: True, lambda _: True)


def changed(change: Callable[[Any], None], *, names: frozenset[str] | None = None) -> tuple[Any, Any, Any]:
    """Change one of two equal modules, and give the change to the other."""
    one, other = Module(), Module()
    here, there = state_of(one), state_of(other)
    here.begin(names)
    change(one)
    found = here.changes(names)
    if found is not None:
        there.apply(pickle.loads(pickle.dumps(found)))
    return one, other, found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b))


def centre_replaced_twice(module: Any) -> None:
    for _ in range(2):  # the memory of the first may be taken by the second
        module.center = module.center + 1


def sets(name: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("number", sets("number", 2)),
        ("losses", lambda m: m.losses.append(torch.ones(3, requires_grad=True) * 2)),
        ("counts", lambda m: m.counts.update(a=3)),
        ("array", lambda m: m.array.__setitem__(1, 4.0)),
        ("tensor", lambda m: m.tensor.add_(1)),
        ("center", lambda m: m.center.add_(1)),
        ("center", centre_replaced_twice),
        ("new", sets("new", {"x": [torch.ones(1)]})),
        ("losses", lambda m: m.losses.append(nn.Parameter(torch.ones(4)))),
    ],
)
def test_a_change_arrives(name: str, change: Callable[[Any], None]) -> None:
    one, other, found = changed(change)
    assert found is not None
    assert not found.refused
    assert same(getattr(one, name), getattr(other, name))
    assert type(getattr(one, name)) is type(getattr(other, name))
    _, other, found = changed(change, names=frozenset({"another"}))
    assert found is None


def test_nothing_is_sent_where_nothing_has_changed() -> None:
    assert changed(lambda _: None)[2] is None


def test_inference_tensors_and_deep_changes() -> None:
    def change(module: Any) -> None:
        with torch.inference_mode():
            module.losses += [torch.ones(2)]
        module.holder.values[1]["a"] += 1
        del module.goes

    one, other, _ = changed(change)
    assert same(one.losses, other.losses)
    assert same(other.holder.values[1]["a"], torch.ones(2))
    assert other.holder.values[2] is other.holder
    assert not hasattr(other, "goes")
    module = Module()
    with torch.inference_mode():
        module.tensor = torch.zeros(2)
    state = state_of(module)
    state.begin()
    with torch.inference_mode():
        module.tensor += 1
    assert state.changes() is not None


def test_what_every_rank_has_stays_what_it_is() -> None:
    kept: list[Any] = []

    def change(module: Any) -> None:
        module.layers.append(module.layer.bias)
        module.counts["a"] += 1

    one, other = Module(), Module()
    kept = other.layers  # a callback may hold the list
    here, there = state_of(one), state_of(other)
    here.begin()
    change(one)
    found = here.changes()
    assert found is not None
    there.apply(found)
    assert other.layers is kept
    assert kept[0] is other.layer
    assert kept[1] is other.layer.weight
    assert kept[2] is other.layer.bias
    assert other.counts["new"] == 0, "the function that makes entries is the one of this process"


@pytest.mark.parametrize("value", [(x for x in "a"), open, lambda: 0])
def test_what_cannot_be_sent_is_named(value: Any) -> None:
    def change(module: Any) -> None:
        module.number = 5
        module.made = [value]

    _, other, found = changed(change)
    if value is open:
        assert other.made == [open]
        return
    assert list(found.refused) == [("", "made")]
    assert other.number == 5
