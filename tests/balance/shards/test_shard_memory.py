"""Weights follow what each device has left; a model that does not fit is refused with what is missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.shards.memory import ModelMemory, RankMemory, weights_by_memory
from lightning_hetero.exceptions import InfeasiblePlanError

GB = 1e9


def test_weights_are_what_is_left() -> None:
    ranks = [RankMemory(24 * GB, 4 * GB), RankMemory(12 * GB, 2 * GB)]
    assert weights_by_memory(ranks, ModelMemory(20 * GB, 2 * GB)) == (18 * GB, 8 * GB)


@given(
    st.lists(st.tuples(st.floats(1, 100), st.floats(0, 1)), min_size=1, max_size=5),
    st.floats(0, 1),
    st.floats(0.01, 0.99),
)
def test_whatever_fits_together_fits_on_each(ranks: list[tuple[float, float]], gathered: float, used: float) -> None:
    memory = [RankMemory(free + 2, activations) for free, activations in ranks]
    left = sum(rank.free_bytes - rank.activation_bytes - gathered for rank in memory)
    model = ModelMemory(left * used, gathered)
    weights = weights_by_memory(memory, model)
    for weight, rank in zip(weights, memory, strict=True):
        peak = model.sharded_bytes * weight / sum(weights) + gathered + rank.activation_bytes
        assert peak <= rank.free_bytes * (1 + 1e-9)


def test_what_is_missing_is_said() -> None:
    ranks = [RankMemory(6 * GB), RankMemory(4 * GB)]
    with pytest.raises(InfeasiblePlanError, match=r"take 16 GB, .*only 5 GB, 3 GB left, so 8 GB are missing.* 50%"):
        weights_by_memory(ranks, ModelMemory(16 * GB, 1 * GB))
    with pytest.raises(InfeasiblePlanError, match=r"rank 1 has 4 GB .* \(3 GB\) .* \(2 GB\) take 1 GB more"):
        weights_by_memory([RankMemory(6 * GB), RankMemory(4 * GB, 3 * GB)], ModelMemory(1 * GB, 2 * GB))


def test_the_batch_that_would_fit_is_said() -> None:
    ranks = [RankMemory(6 * GB, 3 * GB), RankMemory(4 * GB, 1 * GB)]
    with pytest.raises(InfeasiblePlanError, match=r"2 GB are missing.* A batch of 50% of the size would fit"):
        weights_by_memory(ranks, ModelMemory(6 * GB, 1 * GB))
    assert weights_by_memory([RankMemory(6 * GB, 1.5 * GB), RankMemory(4 * GB, 0.5 * GB)], ModelMemory(6 * GB, 1 * GB))
    with pytest.raises(InfeasiblePlanError, match=r"take 1 GB more\. A batch of 75% of the size would fit"):
        weights_by_memory([RankMemory(5 * GB, 4 * GB), RankMemory(8 * GB, 1 * GB)], ModelMemory(3 * GB, 2 * GB))
    with pytest.raises(InfeasiblePlanError) as error:
        weights_by_memory(ranks, ModelMemory(9 * GB, 1 * GB))
    assert "batch of" not in str(error.value)
