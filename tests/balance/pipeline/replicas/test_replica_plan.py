"""What a plan of replicas says, and which plans are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.exceptions import ConfigurationError

# Rank 3 has the first two layers and rank 0 the last one; rank 1 has all; rank 2 has both ends of a V with rank 4.
PLAN = ReplicaPlan(
    (
        Replica((0, 3), StagePlan((1, 0), (2, 3)), 3.0),
        Replica((1,), StagePlan((0,), (3,)), 2.0),
        Replica((2, 4), StagePlan((0, 1, 0), (1, 2, 3)), 1.0),
    )
)


def test_it_numbers_ranks_of_the_run() -> None:
    assert (PLAN.world_size, PLAN.num_layers, PLAN.last_ranks) == (5, 3, (0, 1, 2))
    assert [PLAN.replica_of(rank) for rank in range(5)] == [0, 1, 2, 0, 2]
    assert [PLAN.owners_of(layer) for layer in range(3)] == [(1, 2, 3), (1, 3, 4), (0, 1, 2)]


def test_it_divides_batches_by_shares() -> None:
    assert PLAN.samples(60) == (30, 20, 10)
    assert sum(PLAN.samples(7)) == 7
    assert PLAN.samples(1) == (1, 0, 0)


def test_a_replica_takes_the_costs_of_its_ranks() -> None:
    costs = LayerCosts.of_speeds([(1.0, 2.0)] * 3, [1, 2, 4, 8, 16])
    assert PLAN.replicas[0].costs(costs) == LayerCosts.of_speeds([(1.0, 2.0)] * 3, [1, 8])


def test_it_survives_json() -> None:
    assert ReplicaPlan.from_dict(PLAN.to_dict()) == PLAN


ONE = StagePlan((0,), (3,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replica((0, 1), ONE, 1.0), "as many ranks as its stages use"),
        (lambda: Replica((0, 0), StagePlan((1, 0), (1, 3)), 1.0), "each once"),
        (lambda: Replica((0,), ONE, 0.0), "share of a replica must be a finite positive number, got 0.0"),
        (lambda: ReplicaPlan(()), "Each rank must belong to one replica"),
        (lambda: ReplicaPlan((Replica((0,), ONE, 1.0), Replica((2,), ONE, 1.0))), "Each rank must belong"),
        (lambda: ReplicaPlan((Replica((0,), ONE, 1.0), Replica((1,), StagePlan((0,), (4,)), 1.0))), r"\[3, 4\] layers"),
        (lambda: ReplicaPlan((Replica((1,), ONE, 1.0), Replica((0,), ONE, 1.0))), "got rank 1"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
