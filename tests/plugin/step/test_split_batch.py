"""Batches are cut along their samples, or refused."""

from __future__ import annotations

import enum
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate

from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.step.batch_size import samples_in
from lightning_hetero.plugin.step.split_batch import split_batch, tensors_in

Pair = namedtuple("Pair", ["x", "y"])
X = torch.arange(10.0).view(5, 2)
Y = torch.arange(5)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.mark.parametrize(
    ("batch", "first", "second"),
    [
        (X, X[:3], X[3:]),
        ([X, Y], [X[:3], Y[:3]], [X[3:], Y[3:]]),
        ((X, "name", 3, None), (X[:3], "name", 3, None), (X[3:], "name", 3, None)),
        ([X, list("abcde")], [X[:3], list("abc")], [X[3:], list("de")]),
        ([X, [{0: i} for i in range(5)]], [X[:3], [{0: 0}, {0: 1}, {0: 2}]], [X[3:], [{0: 3}, {0: 4}]]),
        ([X, torch.tensor(7)], [X[:3], torch.tensor(7)], [X[3:], torch.tensor(7)]),
    ],
)  # fmt: skip
def test_keeps_the_structure(batch: Any, first: Any, second: Any) -> None:
    for found, expected in zip(split_batch(batch, (3, 2)), (first, second), strict=True):
        assert type(found) is type(expected)
        if isinstance(found, torch.Tensor):
            assert torch.equal(found, expected)
        else:
            assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_keeps_the_types_of_mappings_and_named_tuples() -> None:
    first, _ = split_batch(OrderedDict(x=X, inner={"y": Y}), (3, 2))
    assert isinstance(first, OrderedDict)
    assert torch.equal(first["inner"]["y"], Y[:3])
    named, _ = split_batch(Pair(X, Y), (3, 2))
    assert isinstance(named, Pair)
    assert torch.equal(named.y, Y[:3])


def test_what_default_collate_makes_can_always_be_cut() -> None:
    """As many fields as samples: lists hold fields there, but for strings."""
    batch = default_collate([(torch.ones(2), 0, "a"), (torch.zeros(2), 1, "b"), (torch.zeros(2), 2, "c")])
    first, second = split_batch(batch, (2, 1), lists_are_fields=True)
    assert torch.equal(first[1], torch.tensor([0, 1]))
    assert list(first[2]) == ["a", "b"]
    assert torch.equal(second[0], torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([torch.ones(5, 5)] * 5, "list of 5 entries of 5"),  # five images of five channels, or five fields
        ([X, torch.ones(3)], r"a tensor of shape \(3,\)"),
        ([X, object()], "an object of type 'object'"),
        (["a", "b"], "without a tensor whose first dimension is its 5 samples"),
        ({"x": torch.ones(4, 2)}, "without a tensor whose first dimension is its 5 samples"),
    ],
)
def test_refuses_what_cannot_be_told(batch: Any, message: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=message):
        split_batch(batch, (3, 2))


class Colour(enum.Enum):
    RED = 1


@dataclass
class Sample:
    x: torch.Tensor
    names: list[str]
    note: str = "kept"
    inner: Any = None


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: Any = field(default=None)


@dataclass(frozen=True, slots=True)
class Slots:
    x: torch.Tensor
    y: Any = None


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """Like the outputs of transformers: a dataclass that is a mapping and refuses ``update``."""

    x: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("x", "hidden"):
            if getattr(self, name) is not None:
                super().__setitem__(name, getattr(self, name))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("You cannot use `update`")

    def __reduce__(self) -> Any:
        return type(self), (self.x, self.hidden)


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping with an attribute."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.kind = "encoding"


Times = namedtuple("Times", ["x", "first", "last"])


@pytest.mark.parametrize(
    ("batch", "get"),
    [
        (Sample(X, list("abcde"), inner={"y": Y}), lambda b: (b.x, b.names, b.note, b.inner["y"])),
        (Frozen(X, (Y, None)), lambda b: (b.x, b.y[0], b.y[1])),
        (Slots(X, Y), lambda b: (b.x, b.y)),
        (Output(X, (Y, X)), lambda b: (b.x, b["x"], b.hidden[0], b["hidden"][1])),
        (Output(None, X), lambda b: (b.hidden, list(b))),
        (Encoding({"x": X, "y": [1, 2, 3, 4, 5]}), lambda b: (b["x"], b["y"], b.kind)),
        (defaultdict(torch.Tensor, x=X), lambda b: (b["x"], b.default_factory)),
        (types.SimpleNamespace(x=X, y=Y, name="n"), lambda b: (b.x, b.y, b.name)),
        (types.MappingProxyType({"x": X}), lambda b: (b["x"],)),
        (Times(X, 1, 2), lambda b: (b.x, b.first, b.last)),
        ([X, np.arange(5), np.float32(2), np.array(3)], lambda b: (b[0], b[1].tolist(), float(b[2]), int(b[3]))),
        (
            {"x": X, "path": Path("a"), "when": date(2020, 1, 1), "c": Colour.RED, "s": {1, 2},
             "d": torch.device("cpu"), "t": torch.float32, "f": len, "size": torch.Size([5, 5]),
             "z": 1 + 2j, "b": b"q", "e": [], "n": {"m": {}}},
            lambda b: (b["x"], b["path"], b["when"], b["c"], b["s"], b["d"], b["t"], b["f"], b["size"], b["z"], b["e"]),
        ),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_parts_have_the_class_and_the_metadata_of_the_batch(batch: Any, get: Any) -> None:
    assert samples_in(batch) == 5
    before = [tensor.clone() for tensor in tensors_in(batch)]
    parts = split_batch(batch, (3, 2))
    for part, span in zip(parts, (slice(0, 3), slice(3, 5)), strict=True):
        assert type(part) is type(batch)
        for found, whole in zip(get(part), get(batch), strict=True):
            if isinstance(whole, torch.Tensor):
                assert torch.equal(found, whole[span])
            elif isinstance(whole, list) and len(whole) == 5:
                assert found == whole[span]
            else:
                assert found == whole
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_in(batch), strict=True)), "the batch has changed"


class Hidden(UserDict):  # type: ignore[type-arg]
    def __init__(self, data: Any, mask: torch.Tensor) -> None:
        super().__init__(data)
        self.mask = mask


@dataclass
class Derived:
    x: torch.Tensor

    def __post_init__(self) -> None:
        self.double = self.x * 2


class Locked(dict):  # type: ignore[type-arg]
    def __setitem__(self, *_: Any) -> None:
        raise TypeError("locked")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Sample(X, [], inner=torch.ones(3)), r"a tensor of shape \(3,\)"),
        (Frozen(X, {"y": torch.ones(4, 5)}), r"a tensor of shape \(4, 5\)"),
        ([X, np.ones((3, 5))], r"an array of shape \(3, 5\)"),
        ([X, {"y": {torch.ones(5)}}], "an object of type 'set'"),
        (Hidden({"x": X}, torch.ones(5)), r"a 'Hidden' with tensors in \['mask'\]"),
        (Derived(X), r"a 'Derived' with tensors in \['double'\]"),
        (Locked(x=X), "a 'Locked', which cannot be written to"),
        ([X, pack_sequence([torch.ones(1)] * 5)], "a 'PackedSequence', which is ordered by time"),
        ([X, torch.nested.nested_tensor([torch.ones(2)] * 5)], "a tensor of shape nested"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refuses_what_hides_or_counts_other_things(batch: Any, message: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=message):
        split_batch(batch, (3, 2))


def test_attrs_classes_are_cut() -> None:
    attrs = pytest.importorskip("attrs")
    cls = attrs.make_class("Item", {"x": attrs.field(), "_name": attrs.field(default="n")}, frozen=True, slots=True)
    first, second = split_batch(cls(X), (3, 2))
    assert samples_in(cls(X)) == 5
    assert torch.equal(first.x, X[:3])
    assert torch.equal(second.x, X[3:])
    assert first._name == "n"
