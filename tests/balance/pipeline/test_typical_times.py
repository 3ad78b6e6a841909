"""What layers take in a training is told from short runs, also on a device that has to wait now and then."""

from __future__ import annotations

from random import Random

import pytest

from lightning_hetero.balance.pipeline.typical_times import LayerRuns, PassSeconds, typical_times


def runs_under_quota(percent: int, period_us: int, pass_us: list[int], *, seed: int = 0) -> list[LayerRuns]:
    """Return runs of layers, each timed for 0.05 s, on a device that works for a part of each period only."""
    now_us, layers = Random(seed).randrange(period_us), []

    def run(work_us: int) -> float:
        nonlocal now_us
        begun_us, quota_us = now_us, percent * period_us // 100
        while work_us:
            done_us = min(max(quota_us - now_us % period_us, 0), work_us)
            now_us, work_us = now_us + done_us, work_us - done_us
            if work_us:
                now_us += period_us - now_us % period_us
        return (now_us - begun_us) / 1e6

    for us in pass_us:
        begun_us, forward_s, backward_s = now_us, list[float](), list[float]()
        while len(forward_s) < 3 or (len(forward_s) < 10 and now_us - begun_us < 50_000):
            forward_s.append(run(us))
            backward_s.append(run(2 * us))
        layers.append(LayerRuns(tuple(forward_s), tuple(backward_s)))
    return layers


@pytest.mark.parametrize("percent", [30, 40, 60, 80])
@pytest.mark.parametrize("period_us", [5_000, 10_000])
def test_a_quota_slows_layers_down_as_it_does_in_a_training(percent: int, period_us: int) -> None:
    pass_us = [1_000, 2_000] * 6
    for seed in range(20):
        found = typical_times(runs_under_quota(percent, period_us, pass_us, seed=seed))
        whole_s = sum(t.forward_s + t.backward_s for t in found)
        assert whole_s == pytest.approx(3e-6 * sum(pass_us) * 100 / percent, rel=0.21)


def test_a_device_of_its_own_is_measured_by_medians_whatever_disturbs_single_runs() -> None:
    steady = LayerRuns((1.0, 1.1, 0.9), (2.0, 2.1, 1.9), (0.9, 1.0, 5.0), (1.2, 1.2, 1.1))
    disturbed = LayerRuns((1.0, 9.0, 1.0), (2.0, 2.0, 30.0))
    found = typical_times([*[steady] * 10, disturbed])
    assert found[0] == PassSeconds(1.0, 2.0, 1.0, 1.2)
    assert found[-1] == PassSeconds(1.0, 2.0, 2.0, 0.0)


def test_parts_of_a_backward_pass_are_slowed_down_too() -> None:
    waits = LayerRuns((1.0, 5.0, 1.0), (1.0, 1.0, 5.0), (0.5, 4.5, 0.5), (0.6, 0.6, 4.6))
    times = typical_times([waits] * 4)[0]
    factor = 14 / 6
    assert times.forward_s == pytest.approx(factor)
    assert (times.input_s, times.weight_s) == pytest.approx((0.5 * factor, 0.6 * factor))


def test_layers_that_take_no_time_have_none() -> None:
    nothing = LayerRuns((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    assert typical_times([nothing]) == [PassSeconds(0.0, 0.0, 0.0, 0.0)]
    assert typical_times([]) == []


@pytest.mark.parametrize("layers", [3, 5, 12])
def test_one_disturbed_run_of_a_small_model_says_nothing_about_the_device(layers: int) -> None:
    steady = LayerRuns((0.010,) * 3, (0.020,) * 3)
    disturbed = LayerRuns((0.010, 0.210, 0.010), (0.020,) * 3)
    assert set(typical_times([*[steady] * (layers - 1), disturbed])) == {PassSeconds(0.010, 0.020, 0.020, 0.0)}
