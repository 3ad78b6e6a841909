"""Step by step, the session asks for the right actions and is in the right phase."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lightning_hetero.balance.tuning.actions import (
    AdoptSuggestion,
    BeginAgain,
    ChangePlan,
    CloseStep,
    ExchangeReports,
    KeepPlan,
    ShowSpeedUp,
    StartTimer,
    StopTimer,
)
from lightning_hetero.balance.tuning.rank_report import RankReport
from lightning_hetero.balance.tuning.saved_balance import SavedBalance
from lightning_hetero.balance.tuning.session import Phase, StepFacts, TuningSession, TuningSettings, WindowResult
from lightning_hetero.balance.types import BatchLimits, BatchPlan, MemoryReading, PlanSchedule, WindowTiming
from lightning_hetero.exceptions import DivergedRanksError

EQUAL = BatchPlan((30, 30))
SCHEDULE = PlanSchedule.constant(EQUAL)
NO_LIMITS = BatchLimits()
NO_MEMORY = MemoryReading(0, 0.0, 0.0, 0.0)


def facts(step: int, schedule: PlanSchedule | None = SCHEDULE, samples: int = 60, in_epoch: int = 5) -> StepFacts:
    return StepFacts(step, schedule, samples, in_epoch, math.inf)


def reports(
    plan: BatchPlan, costs: Sequence[float], step: int, limit: int = 0, ahead: Sequence[int] = (0, 0)
) -> list[RankReport]:
    """Return the reports of ranks with these costs per sample after ``step``, with ``ahead`` steps read ahead."""
    return [
        RankReport(WindowTiming(n, 2, cost * n), NO_MEMORY, limit, step + a, 7)
        for n, cost, a in zip(plan.samples, costs, ahead, strict=True)
    ]


def begun(settings: TuningSettings | None = None, suggestion: BatchPlan | None = None) -> TuningSession:
    session = TuningSession(settings or TuningSettings(warmup_steps=1, tune_steps=4))
    assert session.begin(0, SCHEDULE, NO_LIMITS, suggestion) == (StartTimer(),)
    return session


def tune(session: TuningSession, costs: Sequence[float], steps: int = 60) -> list[tuple[int, object]]:
    """Train some steps on ranks of these costs; return the actions that the session asked for besides CloseStep."""
    schedule = SCHEDULE
    asked: list[tuple[int, object]] = []
    for step in range(steps):
        actions = list(session.on_step(facts(step, schedule)))
        while actions:
            action = actions.pop(0)
            if isinstance(action, ExchangeReports):
                result = session.decide(reports(schedule.at(step), costs, step), NO_LIMITS)
                actions += session.follow(result)
            elif isinstance(action, ChangePlan):
                schedule = schedule.with_change(action.first_step, action.plan)
            if not isinstance(action, CloseStep):
                asked.append((step, action))
    return asked


def test_steps_are_measured_after_the_warm_up_and_exchanged_at_the_end_of_a_window() -> None:
    session = begun()
    assert session.phase is Phase.TUNING
    assert session.on_step(facts(0)) == (CloseStep(keep=False, window_begins=True),)
    assert session.on_step(facts(1)) == (CloseStep(keep=True),)
    assert session.on_step(facts(2)) == (CloseStep(keep=True), ExchangeReports())


def test_ragged_batches_and_first_batches_do_not_count() -> None:
    session = begun()
    session.on_step(facts(0))
    assert session.on_step(facts(1, samples=17)) == (CloseStep(keep=False),)
    assert session.on_step(facts(2, in_epoch=0)) == (CloseStep(keep=False),)
    # a window continues until a step counts
    assert session.on_step(facts(3)) == (CloseStep(keep=True), ExchangeReports())
    short = replace(facts(0, in_epoch=0), steps_in_epoch=2)
    only_short = begun(TuningSettings(warmup_steps=0, tune_steps=4))
    assert only_short.on_step(short) == (CloseStep(keep=True),)


def test_another_global_batch_begins_again_and_a_loader_that_is_not_divided_ends_it() -> None:
    session = begun()
    larger = PlanSchedule.constant(BatchPlan((40, 40)))
    assert session.on_step(facts(3, larger, samples=80)) == (BeginAgain(4),)
    session.begin(4, larger, NO_LIMITS)
    assert session.plan == BatchPlan((40, 40))
    assert session.on_step(facts(4, None)) == (StopTimer(),)
    assert session.phase is Phase.NEW
    assert session.on_step(facts(5)) == ()


def test_a_suggestion_is_adopted_after_the_first_step_unless_that_step_ends_the_session() -> None:
    suggestion = BatchPlan((20, 40))
    session = begun(suggestion=suggestion)
    assert session.on_step(facts(0)) == (AdoptSuggestion(), CloseStep(keep=False))
    (change,) = session.adopt_suggestion(3)
    assert isinstance(change, ChangePlan)
    assert (change.first_step, change.plan, change.tune_steps_left) == (3, suggestion, 4)
    assert session.changes == [(3, suggestion)]
    assert session.on_step(facts(1, SCHEDULE.with_change(3, suggestion))) == (CloseStep(keep=False),)
    gathers = begun(suggestion=suggestion)
    assert gathers.on_step(facts(0, None)) == (StopTimer(),)
    assert begun(suggestion=EQUAL).on_step(facts(0)) == (CloseStep(keep=False, window_begins=True),)


def test_unequal_ranks_are_balanced_shown_and_then_watched() -> None:
    session = begun()
    asked = tune(session, (0.001, 0.002))
    changes = [action for _, action in asked if isinstance(action, ChangePlan)]
    assert changes[-1].plan == BatchPlan((40, 20))
    assert [plan for _, plan in session.changes] == [change.plan for change in changes]
    (shown,) = [action for _, action in asked if isinstance(action, ShowSpeedUp)]
    assert [w.samples for w in shown.before] == [30, 30]
    assert [w.samples for w in shown.after] == [40, 20]
    assert session.phase is Phase.WATCHING
    assert not [action for _, action in asked if isinstance(action, KeepPlan)]


def test_equal_ranks_keep_their_plan_and_that_is_reported_once() -> None:
    asked = tune(begun(), (0.001, 0.001))
    (kept,) = [action for _, action in asked if isinstance(action, KeepPlan)]
    assert kept.plan == EQUAL
    assert "more than 5% faster" in kept.reason
    assert not [action for _, action in asked if isinstance(action, ChangePlan | ShowSpeedUp)]


def test_a_rank_that_could_not_be_timed_is_named() -> None:
    session = begun(TuningSettings(warmup_steps=0, tune_steps=2))
    unmeasured = reports(EQUAL, (0.001, 0.001), 1)
    unmeasured[1] = replace(unmeasured[1], window=WindowTiming(0, 0, 0.0))
    (kept, *_) = session.follow(session.decide(unmeasured, NO_LIMITS))
    assert isinstance(kept, KeepPlan)
    assert kept.reason == "no step of rank 1 could be timed, so other shares cannot be judged"


def test_without_watching_the_session_stops_after_it_has_shown_the_speed_up() -> None:
    session = begun(TuningSettings(warmup_steps=1, tune_steps=4, watch_steps=0))
    asked = tune(session, (0.001, 0.002))
    assert [type(action) for _, action in asked][-2:] == [ShowSpeedUp, StopTimer]
    assert session.phase is Phase.TUNED
    assert session.has_nothing_to_do


def test_the_timer_is_stopped_in_long_pauses() -> None:
    """Windows are a quarter of a second apart, and these steps take 0.6 ms."""
    asked = tune(begun(), (0.00001, 0.00001), steps=500)
    kinds = [type(action) for _, action in asked]
    assert kinds.count(StopTimer) > 1
    assert abs(kinds.count(StopTimer) - kinds.count(StartTimer)) <= 1


def test_a_new_plan_holds_after_what_every_rank_has_fetched() -> None:
    session = begun()
    result = session.decide(reports(EQUAL, (0.001, 0.002), 5, ahead=(4, 1)), NO_LIMITS)
    assert result.first_step == 10
    (change,) = session.follow(result)
    assert isinstance(change, ChangePlan)
    assert change.first_step == 10


def test_memory_limits_shares_unless_the_user_has_chosen_micro_batches() -> None:
    def plan_of(limit: int, *, by_memory: bool) -> BatchPlan:
        session = begun()
        ranks = reports(EQUAL, (0.001, 0.004), 2)
        ranks[0] = replace(ranks[0], micro_batch_limit=limit)
        return session.decide(ranks, NO_LIMITS, memory_limits_shares=by_memory).decision.plan

    assert plan_of(40, by_memory=True) == BatchPlan((40, 20))
    assert plan_of(40, by_memory=False) == BatchPlan((48, 12))


def test_a_peak_of_memory_predicts_the_largest_micro_batch() -> None:
    ranks = reports(EQUAL, (0.001, 0.001), 2)
    ranks[0] = replace(ranks[0], memory=MemoryReading(30, 1e9, 4e9, 5e9))
    assert begun().decide(ranks, NO_LIMITS).predicted_micro_batches == (40, None)


def test_ranks_that_differ_are_an_error() -> None:
    ranks = reports(EQUAL, (0.001, 0.001), 2)
    ranks[1] = replace(ranks[1], fingerprint=8)
    with pytest.raises(DivergedRanksError):
        begun().decide(ranks, NO_LIMITS)


def test_a_resumed_session_watches_and_one_of_another_batch_tunes_again() -> None:
    session = begun()
    tune(session, (0.001, 0.002))
    state = json.loads(json.dumps({"devices": ["a", "b"], "schedule": SCHEDULE.to_dict(), **session.to_dict()}))
    saved = SavedBalance.from_dict(state)
    assert saved is not None
    resumed = TuningSession(TuningSettings())
    resumed.restore(saved)
    phases = [resumed.phase]
    assert resumed.step_times == session.step_times
    resumed.begin(60, SCHEDULE, NO_LIMITS)
    phases.append(resumed.phase)
    resumed.stop()
    phases.append(resumed.phase)
    resumed.begin(60, PlanSchedule.constant(BatchPlan((40, 40))), NO_LIMITS)
    phases.append(resumed.phase)
    assert phases == [Phase.TUNED, Phase.WATCHING, Phase.TUNED, Phase.TUNING]


def test_what_is_broadcast_needs_no_rebalancer_on_other_ranks() -> None:
    """Ranks other than zero decide nothing, and follow to the same plan, phase and window."""
    zero, other = begun(), begun()
    for step in range(3):
        assert zero.on_step(facts(step)) == other.on_step(facts(step))
    result: WindowResult = zero.decide(reports(EQUAL, (0.001, 0.002), 2), NO_LIMITS)
    assert zero.follow(result) == other.follow(result)
    assert (zero.plan, zero.phase) == (other.plan, other.phase)
    schedule = SCHEDULE.with_change(3, result.decision.plan)
    for step in range(3, 8):
        assert zero.on_step(facts(step, schedule)) == other.on_step(facts(step, schedule))
