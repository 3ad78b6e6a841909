"""What follows from times that ranks have measured of their layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_hetero.balance.pipeline.measured_costs import by_size, split_where_possible, with_loss_everywhere
from lightning_hetero.balance.pipeline.stages import LayerCosts


def test_a_loss_that_was_not_timed_costs_as_much_more() -> None:
    measured = LayerCosts(((1.0, 1.0, 3.0), (2.0, 2.0, 2.0)), ((2.0, 2.0, 6.0), (4.0, 4.0, 4.0)))
    costs = with_loss_everywhere(measured, [True, False])
    assert costs.forward_s == ((1.0, 1.0, 3.0), (2.0, 2.0, 6.0))
    assert costs.backward_s == ((2.0, 2.0, 6.0), (4.0, 4.0, 12.0))
    # what a rank has measured is never made less, and one layer has no others to compare with
    slow = LayerCosts(((1.0, 1.0), (1.0, 5.0)), ((1.0, 1.0), (1.0, 1.0)))
    assert with_loss_everywhere(slow, [True, False]).forward_s[1] == (1.0, 5.0)
    single = LayerCosts(((1.0,), (2.0,)), ((1.0,), (2.0,)))
    assert with_loss_everywhere(single, [False, True]) == single


def test_two_sizes_tell_what_a_pass_takes_whatever_its_size() -> None:
    def of(size: int) -> LayerCosts:
        return LayerCosts(((0.5 + 0.1 * size, 0.2 * size),), ((1.0 + 0.2 * size, 3.0),))

    costs, overheads = by_size(of(8), of(4), 2.0)
    assert overheads.forward_s[0] == pytest.approx((0.5, 0.0))
    assert overheads.backward_s[0] == pytest.approx((1.0, 3.0))
    assert costs.forward_s[0] == pytest.approx((0.8, 1.6))
    assert costs.backward_s[0] == pytest.approx((1.6, 0.0))


def test_noise_gives_no_negative_times() -> None:
    costs, overheads = by_size(LayerCosts(((1.0,),), ((1.0,),)), LayerCosts(((2.0,),), ((1.0,),)), 2.0)
    assert (overheads.forward_s, costs.forward_s) == (((1.0,),), ((0.0,),))


def test_the_loss_belongs_to_the_part_for_which_others_wait() -> None:
    rows = ((2.0, 6.0), (4.0, 4.0))
    measured = LayerCosts(rows, rows, ((1.0, 5.0), (2.0, 2.0)), ((1.0, 1.0), (2.0, 2.0)))
    costs = with_loss_everywhere(measured, [True, False])
    assert costs.backward_s == ((2.0, 6.0), (4.0, 12.0))
    assert costs.input_s == ((1.0, 5.0), (2.0, 10.0))
    assert costs.weight_s == measured.weight_s


def test_parts_of_backward_passes_have_sizes_too() -> None:
    def of(size: int) -> LayerCosts:
        rows = ((0.1 * size,),)
        return LayerCosts(rows, rows, ((0.5 + 0.1 * size,),), ((0.2 * size,),))

    costs, overheads = by_size(of(8), of(4), 2.0)
    assert (costs.input_s[0][0], overheads.input_s[0][0]) == pytest.approx((0.8, 0.5))
    assert (costs.weight_s[0][0], overheads.weight_s[0][0]) == pytest.approx((1.6, 0.0))


def test_a_layer_is_split_if_all_ranks_can_split_it_for_all_sizes() -> None:
    rows = ((3.0, 3.0, 3.0), (3.0, 3.0, 3.0))
    large = LayerCosts(rows, rows, ((1.0, 1.0, 3.0), (1.0, 1.0, 1.0)), ((2.0, 2.0, 0.0), (2.0, 2.0, 2.0)))
    small = replace(large, input_s=((1.0, 3.0, 3.0), (1.0, 1.0, 1.0)), weight_s=((2.0, 0.0, 0.0), (2.0, 2.0, 2.0)))
    costs, layers = split_where_possible([large, small])
    assert layers == (0,)
    for one in costs:
        assert one.input_s == ((1.0, 3.0, 3.0), (1.0, 3.0, 3.0))
        assert one.weight_s == ((2.0, 0.0, 0.0), (2.0, 0.0, 0.0))
    whole = [LayerCosts(rows, rows, rows, ((0.0,) * 3,) * 2)]
    assert split_where_possible(whole) == ([LayerCosts(rows, rows)], ())
