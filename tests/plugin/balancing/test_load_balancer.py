"""The balancer soon finds the shares of virtual devices of known speed, and does not change what is trained."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, flat, make_trainer, reference_parameters

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.balance.batch.batch_solver import solve_batch
from lightning_hetero.balance.tuning.advice import Advice
from lightning_hetero.balance.types import BatchPlan, DeviceProfile, StepTime
from lightning_hetero.distributed.step_timer import StepTimer
from lightning_hetero.testing import SlowDown

BATCH_SIZE = 32
STEPS_PER_EPOCH = 12


@dataclass
class Outcome:
    """The outcome of a balanced run on one rank."""

    changes: list[tuple[int, BatchPlan]]
    finished: bool
    speed_up: float | None
    sizes: list[int]
    parameters: list[float]
    waiting_s: list[float]
    advice: Advice | None
    own_s: list[float]


def balanced_run(
    factors: list[float],
    seconds_per_sample: float,
    overhead_s: float = 0.0,
    steps: int = 45,
    shares: Any = "auto",
    loader: dict[str, Any] | None = None,
    balancer: LoadBalancer | None = None,
    steps_per_epoch: int = STEPS_PER_EPOCH,
) -> Outcome:
    world_size = dist.get_world_size()
    model = SmallModule()
    callbacks: list[Callback] = [SlowDown(factors, seconds_per_sample, overhead_s)]
    if balancer is not None:
        callbacks.append(balancer)
    trainer = make_trainer(HeteroDDPStrategy(shares=shares), world_size, callbacks, max_steps=steps)
    # the last batch of each epoch is ragged
    size = BATCH_SIZE * world_size * (steps_per_epoch - 1) + 17
    trainer.fit(model, DataLoader(Numbered(size), batch_size=BATCH_SIZE, shuffle=True, **(loader or {})))
    found = [c for c in trainer.callbacks if isinstance(c, LoadBalancer)]  # type: ignore[attr-defined]
    assert len(found) <= 1
    done = found[0] if found else LoadBalancer()
    return Outcome(
        changes=done.changes,
        finished=done.finished,
        speed_up=done.measured_speed_up,
        sizes=[len(samples) for samples in model.ledger],
        parameters=flat(model.network),
        waiting_s=[status.waiting_s for status in done.windows_after],
        advice=done.advice,
        own_s=[status.own_s for status in done.windows_after],
    )


@pytest.mark.parametrize(
    ("factors", "overhead_s"),
    [([1.0, 2.0], 0.0), ([4.0, 1.0], 0.01), ([1.0, 1.0, 2.0], 0.01)],
)
def test_finds_the_optimum_and_trains_exactly(ranks: RankPools, factors: list[float], overhead_s: float) -> None:
    """The plan is within one sample of the optimum after tune_steps + 5 steps, and the parameters are exact."""
    world_size, batch = len(factors), BATCH_SIZE * len(factors)
    outcomes = ranks.run(world_size, balanced_run, factors, 0.002, overhead_s)
    optimum = solve_batch([StepTime(f * overhead_s, f * 0.002) for f in factors], batch, min_samples=1)
    assert all(outcome.changes == outcomes[0].changes and outcome.finished for outcome in outcomes)
    step, plan = outcomes[0].changes[-1]
    assert max(abs(a - b) for a, b in zip(plan.samples, optimum.samples, strict=True)) <= 1
    assert step <= 20 + 5
    for rank, outcome in enumerate(outcomes):
        assert outcome.sizes[0] == BATCH_SIZE
        assert outcome.sizes[-1] == plan.samples[rank]
        assert outcome.speed_up is not None
        assert outcome.speed_up > 1.2
    expected = reference_parameters(BATCH_SIZE * world_size * (STEPS_PER_EPOCH - 1) + 17, batch, 45)
    for outcome in outcomes:
        assert max(abs(a - b) for a, b in zip(outcome.parameters, expected, strict=True)) < 1e-10


class SleepsThenLogs(SmallModule):
    """Rank 0 is twice as slow in the forward pass, after which the ranks communicate what they log."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep((0.004, 0.002)[self.global_rank] * len(batch[0]))
        return super().training_step(batch, batch_idx)


def changes_where_steps_log() -> list[tuple[int, BatchPlan]]:
    balancer = LoadBalancer(tune_steps=8)
    trainer = make_trainer(HeteroDDPStrategy(), 2, [balancer], max_steps=16)
    trainer.fit(SleepsThenLogs(), DataLoader(Numbered(64 * 17), batch_size=32))
    return balancer.changes


def test_waiting_for_what_a_step_logs_is_not_own_time(ranks: RankPools) -> None:
    for changes in ranks.run(2, changes_where_steps_log):
        assert abs(changes[-1][1].samples[1] - 43) <= 2


def test_a_plan_takes_effect_after_the_batches_that_workers_have_read_ahead(ranks: RankPools) -> None:
    loader = {"num_workers": 2, "prefetch_factor": 3}
    outcomes = ranks.run(2, balanced_run, [1.0, 2.0], 0.001, 0.0, 40, "auto", loader, None, 40)
    step, plan = outcomes[0].changes[0]
    # the ranks exchange reports after 3 + 2 steps at the earliest, and six batches have been read ahead by then
    assert step >= 5 + 6
    assert outcomes[0].sizes[step - 1 : step + 1] == [BATCH_SIZE, plan.samples[0]]
    expected = reference_parameters(BATCH_SIZE * 2 * 39 + 17, BATCH_SIZE * 2, 40)
    assert max(abs(a - b) for a, b in zip(outcomes[0].parameters, expected, strict=True)) < 1e-10


class Known(HeteroDDPStrategy):
    """A strategy with devices of two models whose nominal speeds are known, as if a driver told them."""

    nominal_speeds = (1000.0, 2000.0)

    def setup_environment(self) -> None:
        super().setup_environment()
        self.profiles = tuple(
            replace(profile, name=f"model {speed}", nominal_speed=speed)
            for profile, speed in zip(self.profiles, self.nominal_speeds, strict=True)
        )


class Gathering(SmallModule):
    """Gathers the samples of all ranks in the training step, which needs equal shares."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.all_gather(batch[0])
        return super().training_step(batch, batch_idx)


def guessed_run(factors: list[float], module: type[SmallModule]) -> tuple[list[tuple[int, BatchPlan]], bool, list[int]]:
    model, balancer = module(), LoadBalancer()
    trainer = make_trainer(Known(), 2, [SlowDown(factors, 0.002), balancer], max_steps=25)
    trainer.fit(model, DataLoader(Numbered(64 * 30), batch_size=BATCH_SIZE))
    return balancer.changes, balancer.finished, [len(samples) for samples in model.ledger]


def test_begins_with_the_plan_that_nominal_speeds_suggest(ranks: RankPools) -> None:
    """The first step has equal shares, since it may show that they must stay so; then only a right guess is kept."""
    for right in ranks.run(2, guessed_run, [2.0, 1.0], SmallModule):
        assert right[:2] == ([(1, BatchPlan((21, 43)))], True)
    for wrong in ranks.run(2, guessed_run, [1.0, 1.0], SmallModule):
        assert wrong[0][0] == (1, BatchPlan((21, 43)))
        assert wrong[0][-1][1].is_equal
        assert wrong[2][0] == wrong[2][-1] == BATCH_SIZE


def test_guesses_nothing_if_a_step_gathers_its_samples(ranks: RankPools) -> None:
    for changes, _, sizes in ranks.run(2, guessed_run, [2.0, 1.0], Gathering):
        assert (changes, set(sizes)) == ([], {BATCH_SIZE})


def test_a_rank_that_only_delays_the_others_is_named(ranks: RankPools) -> None:
    """The overhead of rank 1 alone is longer than rank 0 needs for the whole batch."""
    outcome = ranks.run(2, balanced_run, [1.0, 12.0], 0.0005, 0.01, 40)[0]
    assert outcome.advice is not None
    assert outcome.advice.ranks_to_drop == (1,)
    assert outcome.advice.speed_up_without > 1.5
    assert outcome.sizes[-1] >= 2 * BATCH_SIZE - 3


class DrawsItsSamples(SmallModule):
    """Does the same work in each step, whatever its mini-batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep((0.06, 0.02)[self.global_rank])
        return super().training_step(batch, batch_idx)


def advice_where_steps_draw() -> Advice | None:
    balancer = LoadBalancer(tune_steps=8)
    trainer = make_trainer(HeteroDDPStrategy(), 2, [balancer], max_steps=40)
    trainer.fit(DrawsItsSamples(), DataLoader(Numbered(64 * 40), batch_size=32))
    return balancer.advice


def test_work_that_does_not_depend_on_the_mini_batch_is_named(ranks: RankPools) -> None:
    for advice in ranks.run(2, advice_where_steps_draw):
        assert advice is not None
        assert advice.constant


def test_equal_devices_keep_equal_shares(ranks: RankPools) -> None:
    for outcome in ranks.run(2, balanced_run, [1.0, 1.0], 0.002):
        assert (outcome.changes, outcome.finished) == ([], True)


def test_fixed_shares_are_not_tuned(ranks: RankPools) -> None:
    for outcome in ranks.run(2, balanced_run, [1.0, 2.0], 0.001, 0.0, 30, [1, 1]):
        assert (outcome.changes, outcome.finished) == ([], False)


def test_a_balancer_starts_from_given_shares(ranks: RankPools) -> None:
    outcomes = ranks.run(2, balanced_run, [1.0, 2.0], 0.001, 0.0, 45, [1, 3], None, LoadBalancer(verbose=False))
    assert outcomes[0].sizes[0] == 16
    plan = outcomes[0].changes[-1][1]
    assert max(abs(a - b) for a, b in zip(plan.samples, (43, 21), strict=True)) <= 1


class Throttle(Callback):
    """Changes the speed of a rank at given steps."""

    def __init__(self, slow_down: SlowDown, factors: dict[int, float]) -> None:
        self.slow_down, self.factors = slow_down, factors

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.slow_down.factors[0] = self.factors.get(trainer.global_step, self.slow_down.factors[0])


def throttled_run(balancer: LoadBalancer) -> tuple[list[tuple[int, BatchPlan]], list[int], list[float]]:
    """Rank 0 becomes twice as slow at step 40 and recovers at step 90."""
    model, slow_down = SmallModule(), SlowDown([1.0, 1.0], 0.001)
    callbacks = [slow_down, Throttle(slow_down, {40: 2.0, 90: 1.0}), balancer]
    trainer = make_trainer(HeteroDDPStrategy(), dist.get_world_size(), callbacks, max_steps=140)
    trainer.fit(model, DataLoader(Numbered(BATCH_SIZE * 2 * 200), batch_size=BATCH_SIZE, shuffle=True))
    return balancer.changes, [len(samples) for samples in model.ledger], flat(model.network)


def test_shares_follow_a_device_that_slows_down_and_recovers(ranks: RankPools) -> None:
    """All ranks change their shares at the same steps, and the parameters stay those of ddp."""
    (changes, sizes, parameters), (others, _, _) = ranks.run(2, throttled_run, LoadBalancer(verbose=False))
    assert changes == others
    assert 40 < changes[0][0] <= 70
    assert abs(sizes[75] - 21) <= 2
    assert abs(sizes[125] - 32) <= 2
    expected = reference_parameters(BATCH_SIZE * 2 * 200, BATCH_SIZE * 2, 140)
    assert max(abs(a - b) for a, b in zip(parameters, expected, strict=True)) < 1e-10


def throttled_asynchronously() -> tuple[list[tuple[int, BatchPlan]], list[int]]:
    """Return the changes, and the steps after which the host waited for its device."""
    waited: list[int] = []
    model, slow_down = SmallModule(), SlowDown([1.0, 1.0], 0.002)
    balancer = LoadBalancer(watch_steps=4)
    trainer = make_trainer(HeteroDDPStrategy(), 2, [Throttle(slow_down, {40: 3.0}), slow_down, balancer], max_steps=70)

    def note(_: StepTimer) -> None:
        waited.append(trainer.fit_loop.total_batch_idx)

    wait = mock.patch.object(StepTimer, "wait_for_device", note)
    asynchronous = mock.patch.object(DeviceProfile, "is_asynchronous", new=True)
    with wait, asynchronous:
        trainer.fit(model, DataLoader(Numbered(1024), batch_size=BATCH_SIZE))
    return balancer.changes, waited


def test_hosts_wait_for_their_devices_while_tuning_and_to_confirm(ranks: RankPools) -> None:
    (changes, waited), (of_peer, waited_too) = ranks.run(2, throttled_asynchronously)
    assert changes == of_peer
    assert waited == waited_too
    ((step, plan),) = [change for change in changes if change[0] > 40][:1]
    assert plan.samples[0] < BATCH_SIZE
    assert set(range(4, 8)) <= set(waited), "in the tuning"
    assert any(40 <= at < step for at in waited), "before the change"
    assert not set(range(32, 40)) & set(waited), "watching costs nothing"


def test_without_watching_the_tuned_shares_stay(ranks: RankPools) -> None:
    for changes, _, _ in ranks.run(2, throttled_run, LoadBalancer(verbose=False, watch_steps=0)):
        assert changes == []


def test_a_few_tuning_steps_correct_in_proportion(ranks: RankPools) -> None:
    balancer = LoadBalancer(warmup_steps=2, tune_steps=4)
    outcomes = ranks.run(2, balanced_run, [1.0, 2.0], 0.002, 0.0, 20, "auto", None, balancer)
    assert outcomes[0].changes[0][0] <= 6
    assert max(abs(a - b) for a, b in zip(outcomes[0].changes[0][1].samples, (43, 21), strict=True)) <= 1
    assert outcomes[0].finished


class Growing(SmallModule):
    """Its batches grow from epoch to epoch; its epochs have the given number of steps."""

    def __init__(self, steps: int, sizes: list[int]) -> None:
        super().__init__()
        self.steps, self.sizes = steps, sizes

    def train_dataloader(self) -> Any:
        size = self.sizes[min(self.current_epoch, len(self.sizes) - 1)]
        return DataLoader(Numbered(size * 2 * self.steps), batch_size=size, shuffle=True)


def run_of_epochs(steps: int, sizes: list[int], epochs: int) -> tuple[bool, list[BatchPlan], list[int]]:
    model, balancer = Growing(steps, sizes), LoadBalancer(warmup_steps=1, tune_steps=8, verbose=False)
    trainer = make_trainer(
        HeteroDDPStrategy(),
        dist.get_world_size(),
        [SlowDown([1.0, 2.0], 0.002), balancer],
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(model)
    return balancer.finished, [plan for _, plan in balancer.changes], [len(samples) for samples in model.ledger]


def test_a_batch_size_that_changes_during_the_tuning_restarts_it(ranks: RankPools) -> None:
    """The shares found for the smaller batches are the initial shares for the larger ones."""
    for rank, (finished, _, sizes) in enumerate(ranks.run(2, run_of_epochs, 5, [8, 12, 24], 6)):
        assert finished
        assert abs(sizes[-1] - (32, 16)[rank]) <= 3  # of 24 under equal shares; a loaded machine adds noise


def test_epochs_of_one_step_are_enough(ranks: RankPools) -> None:
    for finished, plans, _ in ranks.run(2, run_of_epochs, 1, [24], 14):
        assert finished
        assert max(abs(a - b) for a, b in zip(plans[-1].samples, (32, 16), strict=True)) <= 1
