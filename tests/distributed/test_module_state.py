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

    def get(self) -> list[Any]:
        return self.values


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
        self.functions: list[Any] = [lambda x: x + 2, lambda x: x + 3]
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
        ("center", lambda m: m.register_buffer("center", torch.ones(5))),
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
        module.functions.append(module.holder.values.copy)
        module.functions.append(module.holder.get)

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
    assert [function(0) for function in other.functions[:2]] == [2, 3]
    assert [method()[0] for method in other.functions[2:]] == [1, 1], "methods come with their objects"


class Sealed:
    """Refuses to be pickled, and to be referred to weakly."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("sealed")


def test_values_that_no_rank_can_compare_have_no_digest() -> None:
    module = Module()
    state = state_of(module)
    state.begin()
    module.number, module.made = 5, Sealed()  # type: ignore[assignment]
    del module.goes
    found = state.digests_of_changes()
    assert found.keys() == {("", "number"), ("", "made"), ("", "goes")}
    assert [place for place, digest in found.items() if digest is None] == [("", "goes"), ("", "made")]
    again = state.digests_of_changes()
    assert again == found, "the same object is no further change"


def test_functions_are_on_every_rank_and_files_are_not() -> None:
    state = state_of(Module())
    state.begin()
    reason = state.unsendable([""])
    assert reason is not None
    assert "`.file` cannot be sent" in reason
    module = Module()
    del module.file
    state = state_of(module)
    state.begin()
    assert state.unsendable([""]) is None
    assert state.unsendable([]) is None


@pytest.mark.parametrize(
    "value", [(x for x in "a"), open, lambda: 0, Sealed(), torch.empty(2, device="meta"), io.StringIO()]
)
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
