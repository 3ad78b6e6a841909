"""Replicas to begin with, before anything is measured."""

from __future__ import annotations

import pytest

from lightning_hetero.balance.pipeline.replicas.given import (
    replicas_of_speeds,
    uniform_groups,
    uniform_replicas,
)
from lightning_hetero.balance.pipeline.stages import StagePlan


def test_groups_differ_by_at_most_one_rank() -> None:
    for world_size in range(1, 9):
        for count in range(1, world_size + 1):
            groups = uniform_groups(world_size, count)
            assert sorted(rank for group in groups for rank in group) == list(range(world_size))
            assert max(map(len, groups)) - min(map(len, groups)) <= 1
            assert groups[0][0] == 0


def test_the_first_rank_of_each_has_the_last_stage() -> None:
    plan = uniform_replicas(6, [(0, 3), (2, 1), (4,)])
    assert plan.last_ranks == (0, 2, 4)
    assert [replica.share for replica in plan.replicas] == [2.0, 2.0, 1.0]
    assert plan.owners_of(0) == (1, 3, 4)
    assert [plan.layers_of(rank) for rank in (1, 2)] == [(0, 1, 2), (3, 4, 5)]
    assert plan.runner_of(0) == 3
    assert plan.runner_of(5) == 0
    assert plan.shared == ()


def test_a_replica_twice_as_fast_gets_twice_the_samples() -> None:
    plan = replicas_of_speeds(6, [(0, 2), (1, 3)], [1.0, 2.0, 1.0, 2.0], 4, "1f1b")
    slow, fast = plan.replicas
    assert slow.stages == fast.stages == StagePlan((1, 0), (3, 6))
    assert fast.share == pytest.approx(2 * slow.share)
    assert plan.samples(9) == (3, 6)
