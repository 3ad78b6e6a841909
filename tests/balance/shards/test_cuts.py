"""Ranges cover every number once and have the sizes that the weights say; ranks of weight zero hold nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.shards.cuts import Cuts, Cutter
from lightning_hetero.exceptions import ConfigurationError

weights = st.lists(st.sampled_from([0.0, 0.1, 1.0, 2.0, 3.0, 1e9]), min_size=1, max_size=5).filter(any)
sizes_of_unit = st.lists(st.integers(1, 1000), min_size=1, max_size=6)
units = st.lists(st.tuples(sizes_of_unit, st.sampled_from([2, 4, 8])), min_size=1, max_size=8)


@given(weights, units, st.booleans())
def test_ranges_cover_every_number_once(weights: list[float], units: list[tuple[list[int], int]], whole: bool) -> None:
    for (sizes, _), cuts in zip(units, Cutter(weights).cut_all(units, whole=whole), strict=True):
        assert cuts.bounds[0] == 0
        assert cuts.bounds[-1] == sum(sizes)
        assert all(begin <= end for begin, end in pairwise(cuts.bounds))
        assert all(size == 0 for size, weight in zip(cuts.sizes, weights, strict=True) if weight == 0)


@given(weights, units)
def test_each_rank_holds_what_its_weight_says(weights: list[float], units: list[tuple[list[int], int]]) -> None:
    held = [0.0] * len(weights)
    for (_, size), cuts in zip(units, Cutter(weights).cut_all(units), strict=True):
        held = [total + n * size for total, n in zip(held, cuts.sizes, strict=True)]
    everything = sum(held)
    for got, weight in zip(held, weights, strict=True):
        assert abs(got - everything * weight / sum(weights)) <= 8.01  # one number


@given(weights, units)
def test_whole_parameters_are_not_cut(weights: list[float], units: list[tuple[list[int], int]]) -> None:
    for (sizes, _), cuts in zip(units, Cutter(weights).cut_all(units, whole=True), strict=True):
        begin = 0
        for size in sizes:
            assert sorted(cuts.within(begin, begin + size))[-1] == size
            begin += size


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
