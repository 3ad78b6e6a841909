"""The loader of a pipeline outside of a run, copied, and where the user's own loader fails."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from harness import RankPools
from torch.utils.data import DataLoader

from lightning_hetero.plugin.pipeline.rank_zero_batches import RankZeroBatches, TrainingBatches

DATA: Any = list(range(6))


def fresh() -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=2)


def training() -> TrainingBatches:
    return TrainingBatches(fresh(), lambda _: (1, None))


@pytest.mark.parametrize("make", [lambda: RankZeroBatches(fresh()), training])
def test_it_is_the_users_loader_outside_of_a_run(make: Any) -> None:
    """Whole, from its beginning, as often as it is read; and so is a copy, in this process or in another."""
    loader = make()
    assert len(loader) == 3
    assert loader.batch_size == 2
    expected = [batch.tolist() for batch in fresh()]
    for one in (loader, copy.copy(loader), loader):
        assert [batch.tolist() for batch in one] == expected
    with pytest.raises(AttributeError):
        loader.nothing  # noqa: B018


def test_a_copy_for_another_process_takes_no_iteration_along() -> None:
    loader = RankZeroBatches(fresh())
    loader._sent = lambda: None  # type: ignore[assignment]  # what cannot be pickled, as a reference to an iteration
    copied = pickle.loads(pickle.dumps(loader))
    assert copied._sent is None
    assert [batch.tolist() for batch in copied] == [batch.tolist() for batch in fresh()]


def test_a_loader_of_an_earlier_fit_is_not_wrapped_twice() -> None:
    loader = fresh()
    assert RankZeroBatches(RankZeroBatches(loader)).original is loader


class Broken(DataLoader[Any]):
    def __iter__(self) -> Any:
        raise OSError("no such file")


def read_broken() -> list[str]:
    iterator, found = iter(RankZeroBatches(Broken(DATA))), []
    for _ in range(2):
        try:
            next(iterator)
        except (OSError, StopIteration) as error:  # noqa: PERF203
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_a_loader_that_cannot_begin_fails_where_a_batch_is_expected(ranks: RankPools) -> None:
    """There, other ranks wait for the batch and can be told."""
    assert ranks.run(1, read_broken) == [["OSError: no such file", "StopIteration: "]]
