"""Train with a library on two ranks, with ``ddp`` and with ``hetero_ddp``, and compare the parameters.

Libraries are imported inside the functions that ranks run: what collects the tests needs none of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from differences import measured
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

import lightning_hetero
from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.testing import SlowDown

SEED = 7
WORLD_SIZE = 2
BATCH_SIZE = 8  # per rank under ddp
STEPS = 16
SAMPLES = WORLD_SIZE * BATCH_SIZE * STEPS  # no last batch that ddp would fill up
TOLERANCE = 1e-6  # of parameters in float32, relative or absolute; only the order of sums differs
MOVED = 1e-3  # parameters that have hardly moved would prove nothing
OBJECT, NAME = "1:3", "one_to_three_ddp"  # how a library takes a strategy with arguments
QUIET: Mapping[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

Strategy = str | DDPStrategy


class Watch(Callback):
    """Keeps the parameters before and after a training, and how many samples this rank had in each step."""

    def __init__(self) -> None:
        self.before = self.after = np.zeros(0)
        self.samples: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return self  # neuralforecast trains a copy of its model, with what that was given

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = parameters(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # not by its class, which pytorch_lightning has twice
        if hasattr(trainer.strategy, "training_slice"):
            self.samples.append(trainer.strategy.training_slice.samples)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after = parameters(pl_module)


def parameters(module: LightningModule) -> npt.NDArray[np.float64]:
    """Return all parameters as one array."""
    return np.concatenate([p.detach().double().flatten().numpy() for p in module.parameters()])


@dataclass(frozen=True)
class Trained:
    """A training on one rank; ``samples`` of each step, none under ``ddp``; ``said``: warnings of the package."""

    before: npt.NDArray[np.float64]
    after: npt.NDArray[np.float64]
    samples: list[int]
    said: str


def strategy_of(name: str, **arguments: Any) -> Strategy:
    """Return the strategy that tests call ``name``: one of the Trainer's names, or one of these for shares 1:3."""
    if name == OBJECT:
        return HeteroDDPStrategy(shares=[1, 3], **arguments)
    if name == NAME:
        lightning_hetero.register(name, shares=[1, 3], **arguments)
    return name


def trainer_of(strategy: Strategy, callbacks: list[Callback], devices: int = WORLD_SIZE, **settings: Any) -> Trainer:
    """Return a quiet Trainer that begins with the same random numbers each time."""
    seed_everything(SEED, verbose=False)
    settings = {"max_steps": STEPS} | settings
    return Trainer(strategy=strategy, accelerator="cpu", devices=devices, callbacks=callbacks, **QUIET, **settings)


def train(program: Callable[..., None], name: str, arguments: Mapping[str, Any], options: tuple[Any, ...]) -> Trained:
    """Run ``program(strategy, callbacks, *options)`` on this rank; with ``hetero_ddp``, rank 0 is slowed down."""
    watch = Watch()
    callbacks: list[Callback] = [watch]
    if name == "hetero_ddp":
        slow = SlowDown([3, 1], seconds_per_sample=0.005)
        callbacks += [slow, LoadBalancer(tune_steps=8, verbose=False, record=False)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program(strategy_of(name, **arguments), callbacks, *options)
    said = "\n".join(str(warning.message) for warning in caught if "`hetero_ddp`" in str(warning.message))
    return Trained(watch.before, watch.after, watch.samples, said)


def trained(
    ranks: RankPools,
    program: Callable[..., None],
    name: str,
    *options: Any,
    world_size: int = WORLD_SIZE,
    **arguments: Any,
) -> list[Trained]:
    """Return what each rank has trained; their parameters are the same, and not those they began with.

    ``arguments`` are those of ``HeteroDDPStrategy``, beside the shares.
    """
    results: list[Trained] = ranks.run(world_size, train, program, name, arguments, options)
    for result in results:
        assert (result.after == results[0].after).all()
        assert np.abs(result.after - result.before).max() > MOVED
    return results


def difference(found: list[Trained], expected: list[Trained]) -> float:
    """Return the largest difference of a parameter, relative or absolute, whichever is less."""
    assert (found[0].before == expected[0].before).all()
    a, b = found[0].after, expected[0].after
    return float((np.abs(a - b) / np.maximum(1.0, np.abs(b))).max())


def shares_differ(found: list[Trained]) -> bool:
    """Return whether the ranks had different numbers of samples in some steps."""
    return any(len(set(step)) > 1 for step in zip(*(rank.samples for rank in found), strict=True))


def assert_trains_as_ddp(
    ranks: RankPools, program: Callable[..., None], *options: Any, unequal: str = OBJECT, warning: str | None = None
) -> None:
    """Compare shares that are unequal from the first step, and shares that change, with ``ddp``.

    ``unequal`` is the former strategy; ``warning`` is a part of the only one, and without it there is none.
    """
    expected = trained(ranks, program, "ddp", *options)
    for name in (unequal, "hetero_ddp"):
        found = trained(ranks, program, name, *options)
        assert shares_differ(found)
        said = found[0].said.splitlines()
        assert not said if warning is None else (len(said) == 1 and warning in said[0])
        assert measured(comparison(program, name, *options), difference(found, expected)) < TOLERANCE


def assert_trains_as_one_process(
    ranks: RankPools, program: Callable[..., None], num_loss_terms: Callable[[Any], int]
) -> None:
    """Compare a loss that is a mean over other things than samples with one process, from which ``ddp`` differs.

    ``program`` takes the number of devices after the strategy and the callbacks.
    """
    expected = trained(ranks, program, "ddp", 1, world_size=1)
    found = trained(ranks, program, OBJECT, WORLD_SIZE, num_loss_terms=num_loss_terms)
    assert shares_differ(found)
    assert measured(comparison(program, OBJECT, "one process"), difference(found, expected)) < TOLERANCE
    plain = trained(ranks, program, "ddp", WORLD_SIZE)
    assert measured(comparison(program, "ddp", "one process"), difference(plain, expected)) > TOLERANCE


def comparison(program: Callable[..., None], *names: Any) -> str:
    """Return how ``--differences`` calls a comparison."""
    library = program.__module__.removeprefix("test_")
    return ", ".join([f"{library}: {program.__name__}", *(str(name) for name in names)])
