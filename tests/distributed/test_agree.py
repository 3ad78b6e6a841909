"""All ranks take the decision of rank zero, and all fail where it fails."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from harness import RankError, RankPools

from lightning_hetero.distributed.agree import agree, gather


def agree_on_sum() -> tuple[list[int], int, int]:
    rank = dist.get_rank()
    decided_by = []

    def decide(messages: list[int]) -> int:
        decided_by.append(rank)
        return sum(messages) + rank  # would differ between ranks if each decided for itself

    return gather(rank * 10), agree(rank + 1, decide), len(decided_by)


def fail_to_agree() -> None:
    def decide(_: list[int]) -> int:
        raise ValueError("no plan for this")

    agree(0, decide)


def test_one_rank_decides_for_all(ranks: RankPools) -> None:
    assert ranks.run(2, agree_on_sum) == [([0, 10], 3, 1), ([0, 10], 3, 0)]


def test_a_failed_decision_fails_on_every_rank(ranks: RankPools) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(2, fail_to_agree, timeout_s=30)
    assert str(caught.value).count("ValueError: no plan for this") == 2


def test_without_a_process_group_the_caller_decides() -> None:
    assert agree(3, lambda messages: messages) == [3]
