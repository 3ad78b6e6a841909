"""Stages and shares of replicas whose ranks are given."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.pipeline.replicas.given import (
    plan_of_groups,
    replicas_of_speeds,
    uniform_groups,
    uniform_replicas,
)
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

LAYERS = [(1.0, 2.0)] * 6


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


@given(st.lists(st.floats(0.2, 5.0), min_size=2, max_size=4), st.integers(1, 6), st.sampled_from(["1f1b", "gpipe"]))
def test_all_replicas_take_equally_long(speeds: list[float], micro_batches: int, schedule: str) -> None:
    costs = LayerCosts.of_speeds(LAYERS, speeds)
    for count in range(1, len(speeds) + 1):
        groups = uniform_groups(len(speeds), count)
        plan, step_s = plan_of_groups(groups, costs, micro_batches, schedule)  # type: ignore[arg-type]
        assert step_s == pytest.approx(max(times_of(plan, costs, micro_batches, schedule)))
        assert times_of(plan, costs, micro_batches, schedule) == pytest.approx([step_s] * count)
        assert sum(replica.share for replica in plan.replicas) == pytest.approx(count)


def times_of(plan: ReplicaPlan, costs: LayerCosts, micro_batches: int, schedule: str) -> list[float]:
    return [
        replica.share
        * simulate_pipeline(
            replica.costs(costs).of_stages(replica.stages),
            micro_batches,
            schedule,  # type: ignore[arg-type]
        ).step_s
        for replica in plan.replicas
    ]


def test_each_replica_has_the_best_stages() -> None:
    costs = LayerCosts.of_speeds([(1.0, 2.0), (4.0, 8.0), (1.0, 2.0), (1.0, 1.0)], [1.0, 3.0, 2.0, 1.0])
    plan, _ = plan_of_groups([(0, 1), (2, 3)], costs, 4)
    for replica in plan.replicas:
        own = replica.costs(costs)
        step_s = [
            simulate_pipeline(own.of_stages(StagePlan((1, 0), (*ends, 4))), 4).step_s
            for ends in combinations(range(1, 4), 1)
        ]
        assert simulate_pipeline(own.of_stages(replica.stages), 4).step_s == pytest.approx(min(step_s))


def test_memory_of_larger_micro_batches() -> None:
    costs = LayerCosts.of_speeds(LAYERS, [1.0, 1.0, 3.0, 3.0])
    memory = StageMemory((1.0,) * 6, (1.0,) * 6, (100.0,) * 4, micro_batches=2)
    free, _ = plan_of_groups([(0, 1), (2, 3)], costs, 2, memory=memory)
    assert [replica.share for replica in free.replicas] == pytest.approx([0.5, 1.5])
    assert free.replicas[1].stages.ends == (4, 6)
    tight = replace(memory, budgets_bytes=(100.0, 100.0, 100.0, 13.0))
    plan, _ = plan_of_groups([(0, 1), (2, 3)], costs, 2, memory=tight)
    fast = plan.replicas[1]
    assert fast.stages.ends == (3, 6), "its first stage would hold 4 + 4 x 2 x 1.5"
    needs = replace(memory, activations_bytes=(fast.share,) * 6, budgets_bytes=(100.0, 13.0))
    assert needs.allows(fast.stages)
    with pytest.raises(InfeasiblePlanError):
        plan_of_groups([(0, 1), (2, 3)], costs, 2, memory=replace(memory, budgets_bytes=(100.0, 100.0, 4.0, 4.0)))


def test_more_ranks_than_layers() -> None:
    with pytest.raises(ConfigurationError, match="at least one layer per rank"):
        plan_of_groups([(0, 1, 2)], LayerCosts.of_speeds([(1.0, 1.0)] * 2, [1.0] * 3), 2)
