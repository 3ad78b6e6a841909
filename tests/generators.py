"""Hypothesis strategies for the values of ``balance``."""

from __future__ import annotations

from hypothesis import strategies as st

from lightning_hetero.balance.types import BatchPlan, StepTime

step_times = st.builds(
    StepTime,
    overhead_s=st.floats(0, 0.1),
    seconds_per_sample=st.floats(1e-5, 0.05),
)


def plans(max_ranks: int = 6, max_samples: int = 20) -> st.SearchStrategy[BatchPlan]:
    """Plans in which every rank has a sample."""
    sizes = st.lists(st.integers(1, max_samples), min_size=1, max_size=max_ranks)
    return sizes.map(lambda samples: BatchPlan(tuple(samples)))
