"""Ranges cover every number once and have the sizes that the weights say; ranks of weight zero hold nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.shards.cuts import Cuts, Cutter
from lightning_hetero.exceptions import ConfigurationError

weights = st.lists(st.sampled_from([0.0, 0.1, 1.0, 2.0, 3.0, 1e9]), min_size=1, max_size=5).filter(any)
units = st.lists(st.tuples(st.integers(1, 6000), st.sampled_from([2, 4, 8])), min_size=1, max_size=8)


@given(weights, units)
def test_ranges_cover_every_number_once_as_the_weights_say(weights: list[float], units: list[tuple[int, int]]) -> None:
    held = [0.0] * len(weights)
    cutter = Cutter(weights)
    for total, size in units:
        cuts = cutter.cut(total, size)
        assert (cuts.bounds[0], cuts.bounds[-1]) == (0, total)
        assert all(begin <= end for begin, end in pairwise(cuts.bounds))
        assert all(n == 0 for n, weight in zip(cuts.sizes, weights, strict=True) if weight == 0)
        held = [before + n * size for before, n in zip(held, cuts.sizes, strict=True)]
    for got, weight in zip(held, weights, strict=True):
        assert abs(got - sum(held) * weight / sum(weights)) <= 8.01  # one number


def test_parts_of_a_parameter() -> None:
    cuts = Cuts((0, 6, 6, 10))
    assert cuts.sizes == (6, 0, 4)
    assert cuts.range_of(2) == (6, 10)
    assert cuts.within(4, 9) == (2, 0, 3)
    assert cuts.within(0, 2) == (2, 0, 0)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [float("inf"), 1.0], [float("nan"), 1.0]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigurationError, match="Weights of shards"):
        Cutter(weights)
