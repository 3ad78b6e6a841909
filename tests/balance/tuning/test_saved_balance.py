"""A loaded state equals the saved one or is refused with a clear error; it never harms the run that loads it."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn

from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.balance.tuning.rebalancer import Rebalancer
from lightning_hetero.balance.tuning.saved_balance import SavedBalance
from lightning_hetero.balance.tuning.step_time_model import StepTimeModel
from lightning_hetero.balance.types import BatchLimits, BatchPlan, PlanSchedule, StepTime, WindowTiming
from lightning_hetero.exceptions import ConfigurationError

COSTS = (0.001, 0.003, 0.002)


def run_windows(rebalancer: Rebalancer, windows: int) -> None:
    """Let the rebalancer decide after some windows, and check that its plans divide the global batch."""
    for _ in range(windows):
        plan = rebalancer.current
        measured = [WindowTiming(n, 4, 0.01 + c * n, 0.0003) for n, c in zip(plan.samples, COSTS, strict=True)]
        decision = rebalancer.update(measured)
        assert decision.plan.global_batch_size == 96
        assert min(decision.plan.samples) >= 1


def saved_state() -> dict[str, Any]:
    plan = BatchPlan((32, 32, 32))
    rebalancer = Rebalancer(plan, plan, BatchLimits(), 0.05, 20)
    run_windows(rebalancer, 8)
    schedule = PlanSchedule.constant(plan).with_change(7, rebalancer.current)
    return {
        "devices": ["K80", "V100", "V100"],
        "finished": True,
        "schedule": schedule.to_dict(),
        "step_times": [time.to_dict() for time in rebalancer.model.step_times()],
        "balance": rebalancer.to_dict(),
    }


STATE = saved_state()


def resume(saved: SavedBalance) -> None:
    """Use a state as the callback does."""
    current = saved.schedule.at(100)
    if saved.balance is None or len(saved.devices) != 3:
        return
    initial = Rebalancer.initial_of(saved.balance)
    if (initial.global_batch_size, current.global_batch_size) != (96, 96):
        return
    model = Rebalancer.model_of(saved.balance)
    rebalancer = Rebalancer(initial, current, BatchLimits(), 0.05, 20, model=model)
    run_windows(rebalancer, 4)
    json.dumps(rebalancer.to_dict(), allow_nan=False)


def test_a_state_is_read_as_it_was_saved() -> None:
    saved = SavedBalance.from_dict(json.loads(json.dumps(STATE)))
    assert saved is not None
    assert saved.balance is not None
    assert saved.schedule.to_dict() == STATE["schedule"]
    assert [time.to_dict() for time in saved.step_times] == STATE["step_times"]
    assert Rebalancer.model_of(saved.balance).to_dict() == STATE["balance"]["model"]
    assert saved.devices == ("K80", "V100", "V100")
    resume(saved)


@pytest.mark.parametrize("state", [{}, {"finished": False}, {**STATE, "finished": False, "schedule": "x"}])
def test_nothing_is_restored_before_the_tuning_has_finished(state: dict[str, Any]) -> None:
    assert SavedBalance.from_dict(state) is None


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(STATE)
    parent: Any = state
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return state


MODEL = ["balance", "model"]
HUGE = 10**400


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["finished"], 1, "`finished` must be true or false, got 1"),
        (["devices"], "V100", "`devices` must be a list, got 'V100'"),
        (["devices"], [1, 2, 3], "`devices` must be a string, got 1"),
        (["devices"], ["V100"], r"All parts of the state must have the same number of ranks, got \[1, 3\]"),
        (["schedule"], None, "`schedule` must be a mapping, got None"),
        (["schedule"], {}, "`first_steps` must be present"),
        (["schedule", "plans"], [[32, 32, 32]], "`plans` must have 2 entries, got 1"),
        (["schedule", "plans", 1], [48, 48], "`plans` must have 3 entries, got 2"),
        (["schedule", "plans", 1], [0, 0, 0], "`samples` must hold at least one sample"),
        (["schedule", "plans", 1, 0], -1, "`plans` must be an integer of at least 0 and below 2\\*\\*53, got -1"),
        (["schedule", "plans", 1, 0], 32.0, "`plans` must be an integer"),
        (["schedule", "plans", 1, 0], True, "`plans` must be an integer"),
        (
            ["schedule", "plans", 1, 0],
            HUGE,
            "`plans` must be an integer of at least 0 and below 2\\*\\*53, got 1000000.*\\.\\.\\.\\.$",
        ),
        (["schedule", "first_steps"], [0, 0], "`first_steps` must increase"),
        (["schedule", "first_steps"], [1, 2], "`first_steps` must start with 0"),
        (["step_times", 0], 3, "`step_time` must be a mapping"),
        (["step_times", 0, "overhead_s"], -1, "`overhead_s` must be finite and not negative"),
        (
            ["step_times", 0, "overhead_s"],
            "0",
            "`overhead_s` must be a number of at least -1e\\+12 and at most 1e\\+12, got '0'",
        ),
        (
            ["step_times", 0, "seconds_per_sample"],
            float("nan"),
            "`seconds_per_sample` must be a .* got nan",
        ),
        (["step_times"], STATE["step_times"][:2], r"same number of ranks, got \[2, 3\]"),
        (["balance"], 4, "`balance` must be a mapping"),
        (["balance", "initial"], [48, 48], r"same number of ranks, got \[2, 3\]"),
        ([*MODEL, "_scale_n"], [32.0], "must have 1 entries, got 3"),
        ([*MODEL, "_scale_n", 0], -1.0, "`_scale_n` of rank 0 must be a value that a model can reach"),
        ([*MODEL, "_scale_s", 2], 0.0, "`_scale_s` of rank 2 must be a value that a model can reach"),
        ([*MODEL, "_size", 1], 0.0, "`_size` of rank 1 must be a value that a model can reach"),
        (
            [*MODEL, "_mean", 1, 1],
            float("inf"),
            "`_mean` must be a number of at least -1e\\+12 and at most 1e\\+12, got inf",
        ),
        ([*MODEL, "_mean", 1], [1.0, 1.0, 1.0], "`_mean` must have 2 entries, got 3"),
        ([*MODEL, "_covariance", 1, 0, 0], -1.0, "`_covariance` of rank 1 must be a value that a model can reach"),
        ([*MODEL, "_covariance", 1, 0, 1], 100.0, "`_covariance` of rank 1 must be a value that a model can reach"),
        ([*MODEL, "_squares", 0], -1, "`_squares` of rank 0 must be a value that a model can reach"),
        ([*MODEL, "_surprise", 0], 0, "`_surprise` of rank 0 must be a value that a model can reach"),
        ([*MODEL, "_freedom"], {}, "`_freedom` must be a list"),
    ],
)
def test_a_damaged_state_is_refused(path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SavedBalance.from_dict(changed(path, value))


NUMBERS = st.floats() | st.integers() | st.sampled_from([0, -1, 1, 1e-300, 1e300, HUGE, -HUGE, 2**63])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in paths(item, (*path, key)))]


PATHS = paths(STATE)[1:]


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    state = copy.deepcopy(STATE)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(PATHS))
        try:
            parent: Any = state
            for key in above:
                parent = parent[key]
            what = draw(st.sampled_from(["other", "number", "number", "gone", "twice"]))
            if what == "gone":
                del parent[last]
            elif what == "twice" and isinstance(parent, list):
                parent.insert(last, parent[last])
            else:
                parent[last] = draw(JSON if what == "other" else NUMBERS)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has removed it
    return state


@settings(max_examples=drawn(500, 4_000))
@given(damaged())
def test_a_damaged_state_is_refused_or_harmless(state: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            saved = SavedBalance.from_dict(state)
        except ConfigurationError:
            return
        if saved is not None:
            resume(saved)


@settings(max_examples=drawn(100, 600))
@given(JSON)
def test_any_other_value_is_refused(value: Any) -> None:
    for read in (StepTime.from_dict, PlanSchedule.from_dict, StepTimeModel.from_dict, StagePlan.from_dict):
        with pytest.raises(ConfigurationError):
            read(value)
    with pytest.raises(ConfigurationError):
        Rebalancer.model_of(value)
    with pytest.raises(ConfigurationError):
        Rebalancer.initial_of(value)


@pytest.mark.parametrize(
    "state",
    [
        {"ranks": [0, 1], "ends": [3]},
        {"ranks": [], "ends": []},
        {"ranks": [0, 0], "ends": [1, 2]},
        {"ranks": [0, 1], "ends": [2, 2]},
        {"ranks": [0, 1], "ends": [1.0, 2]},
        {"ranks": [1, 0], "ends": [1, HUGE]},
    ],
)
def test_invalid_stages_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        StagePlan.from_dict(state)
    assert StagePlan.from_dict({"ranks": [1, 0], "ends": [1, 3]}).layers_of_ranks == (2, 1)
