"""The shares where hosts are slower than their devices: what the critical path would hold is measured."""

from __future__ import annotations

import pytest
from profiles import drawn
from simulation.virtual_device import VirtualRank, train_virtually

BATCH = 128
# name: (host seconds of two ranks, device seconds per sample of two ranks)
MS = 1e-3
EQUAL = {
    "host 8.0 and 7.9": ((8.0, 7.9), 0.02),
    "host 8.0 and 7.6, device near": ((8.0, 7.6), 0.08),
    "nearly balanced": ((6.0, 5.5), 0.1),
    "device-bound": ((4.0, 4.0), 0.2),
    "far device-bound": ((2.0, 2.2), 0.5),
}


@pytest.mark.parametrize("synchronises", [False, True], ids=["free", "rank 0 synchronises"])
@pytest.mark.parametrize("name", EQUAL)
def test_equal_devices_keep_about_equal_shares(name: str, synchronises: bool) -> None:
    host, per_sample = EQUAL[name]
    for seed in range(drawn(2, 20)):
        for jitter in (0.01, 0.05):
            ranks = [
                VirtualRank(host[0] * MS, 0.5 * MS, per_sample * MS, synchronises),
                VirtualRank(host[1] * MS, 0.5 * MS, per_sample * MS),
            ]
            run = train_virtually(ranks, BATCH, 1200, jitter=jitter, seed=seed)
            assert len(run.changes) <= 1, run.changes
            assert 0.45 * BATCH <= run.plan.samples[0] <= 0.55 * BATCH


@pytest.mark.parametrize("ratio", [2, 4])
def test_unequal_devices_are_balanced_soon(ratio: int) -> None:
    ranks = [VirtualRank(1 * MS, 0.5 * MS, 0.2 * MS), VirtualRank(1 * MS, 0.5 * MS, 0.2 * ratio * MS)]
    best = min(
        max(0.5 + 0.2 * n, 0.5 + 0.2 * ratio * (BATCH - n)) for n in range(1, BATCH)
    ) * MS + 0.2 * MS  # fmt: skip
    run = train_virtually(ranks, BATCH, 60)
    assert sum(run.step_s[25:45]) / 20 < 1.02 * best * 1.01


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_devices_that_wait_for_each_other_in_layers_are_balanced(ratio: int) -> None:
    """Every rank takes as long for each layer as the slowest one."""
    ranks = [VirtualRank(1 * MS, 0.5 * MS, 0.2 * MS), VirtualRank(1 * MS, 0.5 * MS, 0.2 * ratio * MS)]
    run = train_virtually(ranks, BATCH, 60, meetings=20, communication_s=0.05 * MS)
    assert abs(run.plan.samples[0] / BATCH - ratio / (ratio + 1)) < 0.05 * ratio / (ratio + 1)


@pytest.mark.parametrize("per_sample", [(0.02, 0.04), (0.02, 0.08), (0.05, 0.2)])
def test_host_bound_ranks_are_never_slower_than_with_equal_shares(per_sample: tuple[float, float]) -> None:
    ranks = [VirtualRank(8 * MS, 0.5 * MS, s * MS) for s in per_sample]
    tuned = train_virtually(ranks, BATCH, 600)
    equal = train_virtually(ranks, BATCH, 600, tuned=False)
    assert tuned.seconds_per_step(200) < 1.01 * equal.seconds_per_step(200)
