"""The first guess compares only devices whose nominal speeds can be compared."""

from __future__ import annotations

import pytest

from lightning_hetero.balance.tuning.prior import nominal_shares
from lightning_hetero.balance.types import DeviceProfile

K80 = DeviceProfile("a", "cuda:0", "Tesla K80", 2187.0)
V100 = DeviceProfile("b", "cuda:0", "Tesla V100", 7834.0)
UNKNOWN = DeviceProfile("c", "cpu", "EPYC")


@pytest.mark.parametrize(
    ("profiles", "shares"),
    [
        ([K80, V100, K80], [2187.0, 7834.0, 2187.0]),
        ([K80, UNKNOWN], None),
        ([UNKNOWN, UNKNOWN], None),
        # same model: only a measurement can tell whether a different clock setting matters
        ([K80, DeviceProfile("a", "cuda:1", "Tesla K80", 1400.0)], None),
    ],
)
def test_guesses_only_if_the_speeds_of_different_models_are_known(
    profiles: list[DeviceProfile], shares: list[float] | None
) -> None:
    assert nominal_shares(profiles) == shares
