"""What windows of asynchronous devices may decide."""

from __future__ import annotations

from itertools import pairwise

from lightning_hetero.balance.tuning.rebalancer import Decision, Rebalancer
from lightning_hetero.balance.tuning.window import summarise
from lightning_hetero.balance.tuning.window_judge import WindowJudge
from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTiming, WindowTiming


def window(samples: int, own_s: float, steps: int = 10) -> WindowTiming:
    timings = [StepTiming(samples, own_s * (1 + 0.001 * (i % 3)), 0.001) for i in range(steps)]
    summary = summarise(timings)
    assert summary is not None
    return summary


def windows(plan: BatchPlan, *seconds_per_sample: float) -> list[WindowTiming | None]:
    return [window(n, n * s) for n, s in zip(plan.samples, seconds_per_sample, strict=True)]


def tuned(judge: WindowJudge[Decision]) -> Rebalancer:
    plan = BatchPlan((32, 32))
    rebalancer = Rebalancer(plan, plan, BatchLimits(), 0.05, 10)
    while not judge.judge(rebalancer, windows(plan, 0.001, 0.001), synchronised=True).tuned:
        pass
    return rebalancer


def test_nothing_moves_before_a_synchronised_window_confirms() -> None:
    judge: WindowJudge[Decision] = WindowJudge(asynchronous=True)
    rebalancer = tuned(judge)
    slow = windows(rebalancer.current, 0.001, 0.004)
    seen = judge.judge(rebalancer, slow, synchronised=False)
    assert seen.plan == BatchPlan((32, 32))
    assert seen.window.synchronised
    assert seen.window.skipped_steps == 0
    confirmed = judge.judge(rebalancer, slow, synchronised=True)
    assert confirmed.plan.samples[0] > 40
    assert confirmed.window.synchronised, "whether it was right has to be seen"


def test_a_doubt_that_is_not_confirmed_is_looked_into_less_and_less_often() -> None:
    judge: WindowJudge[Decision] = WindowJudge(asynchronous=True)
    rebalancer = tuned(judge)
    confirming = []
    for _ in range(100):
        decision = judge.judge(rebalancer, windows(rebalancer.current, 0.001, 0.004), synchronised=False)
        confirming.append(decision.window.synchronised)
        if decision.window.synchronised:
            decision = judge.judge(rebalancer, windows(rebalancer.current, 0.001, 0.001), synchronised=True)
        assert decision.plan == BatchPlan((32, 32))
    asked = [i for i, confirms in enumerate(confirming) if confirms]
    assert asked[0] == 0
    pauses = [b - a for a, b in pairwise(asked)]
    assert pauses == sorted(pauses)
    assert len(asked) <= 6


def test_the_tuning_is_synchronised_and_the_watching_is_not() -> None:
    judge: WindowJudge[Decision] = WindowJudge(asynchronous=True)
    plan = BatchPlan((32, 32))
    rebalancer = Rebalancer(plan, plan, BatchLimits(), 0.05, 10)
    while not (decision := judge.judge(rebalancer, windows(plan, 0.001, 0.001), synchronised=True)).tuned:
        assert decision.window.synchronised
    assert not decision.window.synchronised


def test_ranks_on_their_hosts_need_no_confirmation() -> None:
    judge: WindowJudge[Decision] = WindowJudge(asynchronous=False)
    rebalancer = tuned(judge)
    decision = judge.judge(rebalancer, windows(rebalancer.current, 0.001, 0.004), synchronised=False)
    assert decision.plan.samples[0] > 40
    assert not decision.window.synchronised


def test_a_plan_that_breaks_the_limits_is_left_at_once() -> None:
    judge: WindowJudge[Decision] = WindowJudge(asynchronous=True)
    rebalancer = tuned(judge)
    doubtful = windows(rebalancer.current, 0.001, 0.004)
    judge.judge(rebalancer, doubtful, synchronised=False)
    judge.judge(rebalancer, windows(rebalancer.current, 0.001, 0.001), synchronised=True)  # not confirmed: a pause
    rebalancer.set_limits(BatchLimits(max_samples=(20, 64)))
    decision = judge.judge(rebalancer, windows(rebalancer.current, 0.001, 0.001), synchronised=False)
    assert decision.plan.samples[0] <= 20
