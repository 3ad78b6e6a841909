"""All ranks take the decision of rank zero, and all fail where it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPools
from torch.utils.data import RandomSampler

from lightning_hetero.distributed.collectives import BroadcastOrder, all_gather, decide_on_rank_zero


def agree_on_rows() -> tuple[list[int], list[list[float]], int]:
    rank = dist.get_rank()
    decided_by = []

    def decide(rows: list[list[float]]) -> list[list[float]]:
        decided_by.append(rank)
        return [*rows, [rank]]  # would differ between ranks if each decided for itself

    return all_gather(rank * 10), decide_on_rank_zero([rank + 0.1, float("nan"), 1e300], decide), len(decided_by)


def fail_to_agree() -> None:
    def decide(_: list[list[float]]) -> int:
        raise ValueError("no plan for this")

    decide_on_rank_zero([0.0], decide)


def test_one_rank_decides_for_all(ranks: RankPools) -> None:
    first, second = ranks.run(2, agree_on_rows)
    assert str(first[1]) == str(second[1]) == "[[0.1, nan, 1e+300], [1.1, nan, 1e+300], [0]]"
    assert (first[0], second[0], first[2], second[2]) == ([0, 10], [0, 10], 1, 0)


def test_a_failed_decision_fails_on_every_rank(ranks: RankPools) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(2, fail_to_agree, timeout_s=30)
    assert str(caught.value).count("ValueError: no plan for this") == 2


def test_without_a_process_group_the_caller_decides() -> None:
    assert decide_on_rank_zero([3.0], lambda rows: rows) == [[3.0]]


# ---- the order of an epoch, without other ranks ----------------------------------------------------------------------


def test_an_order_that_is_looked_at_before_it_is_drawn_is_the_one_that_is_drawn() -> None:
    """As by a sanity check of the loader; no random number is used up."""
    sampler: Any = RandomSampler(range(20), generator=torch.Generator().manual_seed(3))
    expected = list(RandomSampler(range(20), generator=torch.Generator().manual_seed(3)))
    order = BroadcastOrder(sampler, epoch=0, lazily=True)
    assert len(order) == 20
    assert list(order) == list(order) == expected
    order.draw()
    assert list(order) == expected
    order.set_epoch(1)
    assert list(order) != expected


def test_samples_without_indices_are_an_order_too() -> None:
    entries = [{"file": "a"}, {"file": "b"}]
    assert list(BroadcastOrder(entries, epoch=0)) == entries
