"""Batches are cut along their samples, or refused."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.step.split_batch import split_batch

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
