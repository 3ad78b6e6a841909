"""The search for the largest size finds it, in few trials."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.batch.search import Search


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 2000))
def test_finds_the_largest_size_that_fits(start: int, beyond: int, most: int) -> None:
    limit = start + beyond - 1  # the first size has run before
    search, tried = Search(start, most), []
    while (size := search.next_size()) is not None:
        tried.append(size)
        search.tell(size <= limit)
    assert search.largest == min(limit, most)
    assert len(tried) == len(set(tried)) <= 22
    assert all(size <= most for size in tried)
