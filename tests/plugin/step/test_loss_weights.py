"""The weights of micro-batches and of ranks, for any real number of loss terms."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.plugin.step.loss_weights import loss_weights


@pytest.mark.parametrize(
    "terms",
    [
        (0.25, 0.5),
        (torch.tensor(0.25), torch.tensor(0.5, dtype=torch.float64)),
        (torch.tensor([1]), torch.tensor(2)),
        (np.float32(0.25), np.int64(0) + 0.5),
        (Fraction(1, 8), Fraction(1, 4)),
        (True, 2),
        (1e-300, 2e-300),
    ],
)
def test_terms_may_be_any_real_number(terms: tuple[Any, ...]) -> None:
    assert loss_weights([0, 1], [1, 1], "mean", lambda part: terms[part]) == pytest.approx([1 / 3, 2 / 3])


def test_no_terms_weigh_nothing() -> None:
    assert loss_weights([0, 1], [1, 1], "mean", lambda part: part * 0.5) == [0.0, 1.0]
    assert loss_weights([0, 1], [1, 1], "mean", lambda _: 0) == [0.0, 0.0]


@pytest.mark.parametrize("terms", [-1, -0.5, math.nan, math.inf, torch.tensor(float("nan"))])
def test_a_number_that_cannot_count_is_refused(terms: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"finite number that is not negative, got (-|nan|inf).* micro-batch 0 of 1"
    ):
        loss_weights([0], [1], "mean", lambda _: terms)


@pytest.mark.parametrize(
    ("terms", "what"),
    [
        (None, "'NoneType'"),
        ("3", "'str'"),
        (1j, "'complex'"),
        (torch.ones(3), r"'Tensor' of shape \(3,\)"),
        (10**400, "'int'"),
        ([3], "'list'"),
    ],
)
def test_what_is_no_number_is_refused(terms: Any, what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"must return one number, got a {what}"):
        loss_weights([0], [1], "mean", lambda _: terms)
