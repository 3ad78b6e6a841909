"""What is given by device name is looked up; the table of bad input is in test_bad_input.py."""

from __future__ import annotations

import pytest

from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.exceptions import ConfigurationError, HeteroError
from lightning_hetero.plugin.common.arguments import caps_of_ranks, shares_of_ranks


def test_slow_down_needs_to_know_the_size_of_a_batch() -> None:
    from lightning_hetero.testing import _samples_in

    with pytest.raises(ConfigurationError, match=r"`seconds_per_sample` needs batches with a tensor .* type object"):
        _samples_in(object())


PROFILES = [DeviceProfile("a", "cuda:0", "Tesla K80"), DeviceProfile("b", "cuda:0", "Tesla V100")]


def test_shares_are_looked_up_by_device_name() -> None:
    assert shares_of_ranks({"Tesla K80": 1, "Tesla V100": 2, "H200": 9}, PROFILES) == [1.0, 2.0]
    assert shares_of_ranks("auto", PROFILES) == [1.0, 1.0]
    assert shares_of_ranks([3, 4], PROFILES) == [3.0, 4.0]


def test_limits_are_looked_up_by_device_name() -> None:
    assert caps_of_ranks("max_batch_size", {"Tesla K80": 24, "Tesla V100": 96}, PROFILES) == [24, 96]
    assert caps_of_ranks("max_batch_size", 8, PROFILES) == [8, 8]
    assert caps_of_ranks("max_batch_size", None, PROFILES) is None
    with pytest.raises(ConfigurationError, match=r"`micro_batch_size` must name the device of every rank, .* rank 1"):
        caps_of_ranks("micro_batch_size", {"Tesla K80": 24}, PROFILES)


def test_a_device_that_the_mapping_does_not_know_is_refused() -> None:
    message = (
        r"`shares` must name the device of every rank, got \['Tesla K80'\], but rank 1 \(b, cuda:0\) runs on"
        r" 'Tesla V100'\. Add it; the devices of this run are \['Tesla K80', 'Tesla V100'\]\."
    )
    with pytest.raises(ConfigurationError, match=message):
        shares_of_ranks({"Tesla K80": 1}, PROFILES)


def test_errors_can_be_caught_as_what_they_are() -> None:
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(ConfigurationError, HeteroError)
