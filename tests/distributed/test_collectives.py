"""All ranks take the decision of rank zero, and all fail where it fails."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from harness import RankError, RankPools

from lightning_hetero.distributed.collectives import all_gather, decide_on_rank_zero


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
