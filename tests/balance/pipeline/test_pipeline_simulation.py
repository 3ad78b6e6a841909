"""The simulation keeps the rules of the pipeline schedules and agrees with published results."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.pipeline.advice import advise_pipeline
from lightning_hetero.balance.pipeline.orders.order import known_order, micro_batches_in_flight
from lightning_hetero.balance.pipeline.simulation import least_step_s, pipeline_step_s, simulate_pipeline
from lightning_hetero.balance.pipeline.stage_solver import solve_stages, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StageTimes

SCHEDULES = st.sampled_from(["gpipe", "1f1b"])
stage_times = st.integers(1, 5).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(0, 5), min_size=n, max_size=n).map(tuple)] * 2)
)


@given(stage_times, st.integers(1, 8), SCHEDULES, st.floats(0, 1))
def test_no_rule_is_broken(
    times: tuple[tuple[float, ...], tuple[float, ...]], micro_batches: int, schedule: Schedule, transfer_s: float
) -> None:
    stages = StageTimes(*times)
    num_stages = len(stages.forward_s)
    timeline = simulate_pipeline(stages, micro_batches, schedule, transfer_s)
    assert pipeline_step_s(stages, micro_batches, schedule, transfer_s) == timeline.step_s
    assert least_step_s(stages, micro_batches, transfer_s) <= timeline.step_s
    passes = {(p.kind, p.stage, p.micro_batch): p for p in timeline.passes}
    assert len(passes) == 2 * num_stages * micro_batches
    for (kind, stage, i), one in passes.items():
        before = passes.get((kind, stage - 1 if kind == "forward" else stage + 1, i))
        assert before is None or one.start_s >= before.end_s + transfer_s
        if kind == "backward":
            assert one.start_s >= passes["forward", stage, i].end_s
    for stage in range(num_stages):
        order = known_order(range(num_stages), micro_batches, schedule)
        own = [passes[kind, stage, i] for kind, _, i in order.actions[stage]]
        assert all(a.end_s <= b.start_s for a, b in pairwise(own))
        held = most = 0
        for one in own:
            held += 1 if one.kind == "forward" else -1
            most = max(most, held)
        assert most == micro_batches_in_flight(stage, num_stages, micro_batches, schedule)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("num_stages", "micro_batches"), [(1, 4), (2, 8), (4, 4), (3, 1)])
def test_equal_stages_wait_for_all_but_one_of_them(num_stages: int, micro_batches: int, schedule: Schedule) -> None:
    """The bubble of Huang et al.: (m + S - 1) (forward + backward)."""
    times = StageTimes((1.0,) * num_stages, (2.0,) * num_stages)
    assert simulate_pipeline(times, micro_batches, schedule).step_s == 3.0 * (micro_batches + num_stages - 1)


def test_advice_compares_with_equal_stages_and_with_one_device() -> None:
    costs = LayerCosts.of_speeds([(0.001, 0.002)] * 12, speeds=[1, 2])
    advice = advise_pipeline(costs, solve_stages(costs), 8)
    assert advice.step_s == pytest.approx(0.108)  # (8 + 1) micro-batches of 12 ms
    assert advice.uniform_step_s == pytest.approx(8 * 0.018 + 0.009)
    assert advice.fastest_rank == 1
    assert advice.alone_s == pytest.approx(8 * 0.018)
    assert len(advice.sentences()) == 2, "16 micro-batches would have a smaller bubble"


def test_advice_warns_of_a_pipeline_that_is_slower_than_one_device() -> None:
    costs = LayerCosts.of_speeds([(0.001, 0.002)] * 6, speeds=[1, 6])
    plan = uniform_stages(6, 2)
    advice = advise_pipeline(costs, plan, 2, batch_size=16)
    assert advice.alone_s < advice.step_s
    assert "rank 1 alone is predicted" in (advice.warning() or "")
    assert "if the model fits" in (advice.warning() or "")
    assert advice.better_micro_batches is not None
    assert advice.better_micro_batches <= 16
    assert any(f"{advice.better_micro_batches} micro-batches instead of 2" in s for s in advice.sentences())
