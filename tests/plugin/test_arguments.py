"""Bad input is one clear error that names argument, rule, value and way out, before any process is launched."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.exceptions import ConfigurationError, HeteroError
from lightning_hetero.plugin.arguments import caps_of_ranks, shares_of_ranks
from lightning_hetero.testing import SlowDown

NAN = float("nan")
INF = float("inf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": "fast"}, "`shares` must be \"auto\", one positive number a rank, .* got 'fast'"),
        ({"shares": 2}, '`shares` must be "auto", .* got 2'),
        ({"shares": None}, '`shares` must be "auto", .* got None'),
        ({"shares": [1, 0]}, r"`shares\[1\]` must be a finite positive number, got 0"),
        ({"shares": [-1, 2]}, r"`shares\[0\]` must be a finite positive number, got -1"),
        ({"shares": [1, NAN]}, r"`shares\[1\]` must be a finite positive number, got nan"),
        ({"shares": [1, INF]}, r"`shares\[1\]` must be a finite positive number, got inf"),
        ({"shares": [1, "2"]}, r"`shares\[1\]` must be a finite positive number, got '2'"),
        ({"shares": [1, True]}, r"`shares\[1\]` must be a finite positive number, got True"),
        ({"shares": {}}, "`shares` must name at least one device"),
        ({"shares": {"Tesla K80": 0}}, r"`shares\['Tesla K80'\]` must be a finite positive number, got 0"),
        ({"shares": {0: 1}}, "`shares` must map device names to numbers, got the name 0"),
        ({"global_batch_size": 0}, "`global_batch_size` must be an integer of at least 1, got 0"),
        ({"global_batch_size": 1.5}, "`global_batch_size` must be an integer of at least 1, got 1.5"),
        ({"global_batch_size": "64"}, "`global_batch_size` must be an integer of at least 1, got '64'"),
        (
            {"max_batch_size": 0},
            "`max_batch_size` must be a positive integer, one a rank, or one for each device name, got 0",
        ),
        ({"max_batch_size": [4, -4]}, r"`max_batch_size` must be a positive integer, .* got \[4, -4\]"),
        ({"max_batch_size": "8"}, "`max_batch_size` must be a positive integer, .* got '8'"),
        ({"max_batch_size": {}}, "`max_batch_size` must name at least one device, got an empty mapping"),
        ({"max_batch_size": {"Tesla K80": 0}}, r"one for each device name, got \{'Tesla K80': 0\}"),
        ({"max_batch_size": {0: 4}}, "`max_batch_size` must map device names to numbers, got the name 0"),
        ({"micro_batch_size": 1.5}, "`micro_batch_size` must be a positive integer, .* got 1.5"),
        ({"micro_batch_size": [True, 4]}, r"`micro_batch_size` must be a positive integer, .* got \[True, 4\]"),
        (
            {"max_batch_size": 4, "batch_multiple": 8},
            r"`max_batch_size` must be at least `batch_multiple` \(8\), got 4",
        ),
        ({"batch_multiple": 0}, "`batch_multiple` must be an integer of at least 1, got 0"),
        ({"batch_multiple": None}, "`batch_multiple` must be an integer of at least 1, got None"),
        ({"loss_reduction": "max"}, "`loss_reduction` must be one of 'mean', 'sum', got 'max'"),
        ({"num_loss_terms": 3}, "`num_loss_terms` must be callable with a batch or None, got 3"),
        ({"num_loss_terms": len, "loss_reduction": "sum"}, "`num_loss_terms` must be None with `loss_reduction"),
    ],
)
def test_strategy_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HeteroDDPStrategy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": [1, 2, 3]}, r"`shares` must have one number a rank \(2\), got 3: \[1, 2, 3\]\. Add or remove"),
        ({"shares": [1]}, r"`shares` must have one number a rank \(2\), got 1"),
        ({"global_batch_size": 1}, r"`global_batch_size` must be at least the number of ranks \(2\), got 1\. Raise it"),
        ({"global_batch_size": 8, "batch_multiple": 8}, r"at least `batch_multiple` times the number of ranks \(8 x 2"),
        ({"max_batch_size": [8, 8, 8]}, r"`max_batch_size` must have one number a rank \(2\), got 3"),
        (
            {"max_batch_size": [8, 16], "global_batch_size": 32},
            r"`max_batch_size` must together hold the global batch of 32 samples, got \[8, 16\], which hold 24:"
            r" 8 too few\. .* lower `global_batch_size` to 24",
        ),
        ({"micro_batch_size": [8]}, r"`micro_batch_size` must have one number a rank \(2\), got 1: \[8\]\. Add"),
        ({"max_batch_size": 8, "global_batch_size": 32}, r"got \[8, 8\], which hold 16: 16 too few"),
    ],
)
def test_what_depends_on_the_number_of_ranks_is_refused_by_the_trainers_constructor(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Trainer(accelerator="cpu", devices=2, strategy=HeteroDDPStrategy(**arguments), logger=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "`warmup_steps` must be an integer of at least 0, got -1"),
        ({"tune_steps": 0}, "`tune_steps` must be an integer of at least 1, got 0"),
        ({"tune_steps": 2.5}, "`tune_steps` must be an integer of at least 1, got 2.5"),
        ({"min_gain": -0.1}, "`min_gain` must be a finite number of at least 0, got -0.1"),
        ({"min_gain": NAN}, "`min_gain` must be a finite number of at least 0, got nan"),
        ({"memory_fraction": 0}, "`memory_fraction` must be a number above 0 and at most 1, got 0"),
        ({"memory_fraction": 92}, "`memory_fraction` must be a number above 0 and at most 1, got 92"),
        ({"memory_fraction": NAN}, "`memory_fraction` must be a number above 0 and at most 1, got nan"),
        ({"memory_fraction": "all"}, "`memory_fraction` must be a number above 0 and at most 1, got 'all'"),
        ({"min_gain": "5%"}, "`min_gain` must be a finite number of at least 0, got '5%'"),
    ],
)
def test_balancer_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LoadBalancer(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": []}, r"`factors` must be one number a rank, got \[\]"),
        ({"factors": "12"}, "`factors` must be one number a rank, got '12'"),
        ({"factors": [1, 0.5]}, r"`factors\[1\]` must be a finite number of at least 1, got 0.5"),
        ({"factors": [1, -2], "seconds_per_sample": 0.1}, r"`factors\[1\]` must be a finite number of at least 0"),
        ({"factors": [1, 2], "seconds_per_sample": -1}, "`seconds_per_sample` must be finite and positive, got -1"),
        ({"factors": [1, 2], "overhead_s": 0.1}, "`overhead_s` must be 0 without `seconds_per_sample`, got 0.1"),
    ],
)
def test_slow_down_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SlowDown(**arguments)


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
