"""Which batch is which is told by the memory that batches hold, whatever they are made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hetero.distributed.data.pairing import Drawn
from lightning_hetero.exceptions import UnsupportedFeatureError

Make = Any


class Plain:
    """A batch of a class that only its owner knows."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


MAKE: list[Any] = [
    lambda x: x,
    lambda x: [x, torch.empty(0)],
    lambda x: {"x": (x, "name", 3)},
    Plain,
    lambda x: SimpleNamespace(inner=Plain(x)),
    lambda x: [x, *[[0] * 100] * 200],  # not all of it is looked at
]


def drawn(*batches: Any) -> Drawn:
    made = Drawn("Loader", compares=True)
    for number, batch in enumerate(batches):
        made.add(number, batch)
    made.exhausted = True
    return made


@pytest.mark.parametrize("make", MAKE)
def test_batches_are_known_by_their_memory(make: Any) -> None:
    batches = [make(torch.full((2,), float(i))) for i in range(3)]
    known = drawn(*batches)
    assert [known.take(batch) for batch in batches] == [0, 1, 2]
    known.end()
    with pytest.raises(UnsupportedFeatureError, match="yields batches in another order"):
        drawn(*batches).take(batches[1])
    with pytest.raises(UnsupportedFeatureError, match="yields more batches than it draws"):
        known.take(batches[0])


def test_batches_that_are_left_over_are_counted() -> None:
    batches = [torch.full((2,), float(i)) for i in range(3)]
    known = drawn(*batches)
    known.take(batches[0])
    with pytest.raises(UnsupportedFeatureError, match="has drawn 2 batches more than it yields"):
        known.end()


def test_batches_without_memory_come_in_their_order() -> None:
    known = drawn("a", "b")
    assert [known.take("x"), known.take("y")] == [0, 1]
    known.end()
