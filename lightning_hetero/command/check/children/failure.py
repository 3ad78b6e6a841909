"""Make the last rank fail; how all ranks end is judged where they were started."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, Trainer

from lightning_hetero.command.check.children.clocks import Pause
from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.children.trainings import Small, loader
from lightning_hetero.command.check.finding import Finding, failed

__all__ = ["exception", "kill", "stop"]

_STEP = 6
_STEPS = 40
_BATCH_SIZE = 8
# The longest that a rank waits for another; a stopped one is noticed no sooner.
_TIME_OUT = timedelta(seconds=20)


def exception(rank: Rank) -> Finding:
    """Raise an exception."""
    return _fail(rank, _raise)


def kill(rank: Rank) -> Finding:
    """Kill the process."""
    return _fail(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stop(rank: Rank) -> Finding:
    """Stop the process for good."""
    return _fail(rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _raise() -> None:
    raise OSError("raised by the check")


class _Fails(Callback):
    def __init__(self, rank: Rank, fail: Callable[[], None]) -> None:
        self.rank, self.fail = rank, fail

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.rank.is_last and trainer.global_step == _STEP:
            self.rank.note_fault()
            self.fail()


def _fail(rank: Rank, fail: Callable[[], None]) -> Finding:
    pause = Pause(rank.device)
    module = Small(before=lambda samples: pause(0.02))
    trainer = rank.trainer(rank.hetero(timeout=_TIME_OUT), [_Fails(rank, fail)], max_steps=_STEPS)
    trainer.fit(module, loader(_BATCH_SIZE, _BATCH_SIZE * rank.ranks * (_STEPS + 1)))
    return failed("the training went on")
