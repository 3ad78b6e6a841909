"""What passes take is added up step by step, on any clock, and nothing is marked in other steps."""

from __future__ import annotations

from lightning_hetero.balance.types import StepTiming
from lightning_hetero.distributed.pass_timer import PassTimer


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now, self.marks, self.waits, self.made = 0.0, 0, 0, 0

    def make(self) -> Clock:
        self.made += 1
        return self

    def mark(self) -> float:
        self.marks += 1
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self, mark: float) -> None:
        assert mark == self.now
        self.waits += 1

    def run(self, seconds: float) -> float:
        self.now += seconds
        return seconds


def test_only_passes_of_measured_steps_count() -> None:
    clock = Clock()
    timer = PassTimer(clock.make)
    timer.time(clock.run, 5.0)
    timer.end_step(8)
    assert (clock.made, clock.marks, timer.take()) == (0, 0, [])
    for seconds in (1.0, 2.0):
        timer.begin_step()
        assert timer.time(clock.run, seconds) == seconds
        clock.run(100.0)  # waits for another stage
        timer.time(clock.run, 2 * seconds)
        timer.end_step(8)
        timer.time(clock.run, 7.0)
    assert clock.waits == 0
    assert timer.take() == [StepTiming(8, 3.0, 100.0), StepTiming(8, 6.0, 100.0)], "waiting lies between passes"
    assert timer.take() == []


def test_the_host_waits_before_each_pass_of_a_synchronised_step_only() -> None:
    clock = Clock()
    timer = PassTimer(clock.make)
    timer.begin_step(synchronised=True)
    timer.time(clock.run, 1.0)
    clock.run(100.0)
    timer.time(clock.run, 1.0)
    timer.end_step(8)
    timer.begin_step()
    timer.time(clock.run, 1.0)
    assert clock.waits == 2
    assert timer.take() == [StepTiming(8, 2.0)], "the hosts' waiting is none of the step's"
    timer.begin_step()
    timer.discard()
    timer.end_step(8)
    assert timer.take() == []
