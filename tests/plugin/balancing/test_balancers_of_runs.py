"""Where a run gets its balancer from, and what a balancer keeps when a run is resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from harness import RankError, RankPools
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from plugin.balancing.test_load_balancer import BATCH_SIZE, STEPS_PER_EPOCH
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, make_trainer

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.testing import SlowDown


def resumed_run(folder: Path, seconds_per_sample: float) -> dict[str, Any]:
    """Tune, save, and continue in a new Trainer; then do the same with devices of another name and with a cap."""
    world_size = dist.get_world_size()

    def fit(
        steps: int, path: Path | None, device: str = "the same", cap: int | None = None
    ) -> tuple[SmallModule, LoadBalancer]:
        model, balancer = SmallModule(), LoadBalancer(verbose=False)
        checkpoint = ModelCheckpoint(folder, every_n_train_steps=30, save_top_k=-1)
        slow_down = SlowDown([1.0, 2.0], seconds_per_sample)
        trainer = make_trainer(
            _Named(device, cap),
            world_size,
            [slow_down, balancer, checkpoint],
            max_steps=steps,
            enable_checkpointing=True,
        )
        size = BATCH_SIZE * world_size * STEPS_PER_EPOCH
        loader = DataLoader(Numbered(size), batch_size=BATCH_SIZE, shuffle=True)
        trainer.fit(model, loader, ckpt_path=path, weights_only=False)
        return model, balancer

    _, first = fit(36, None)
    path = folder / "epoch=2-step=30.ckpt"
    assert path.exists()
    model, second = fit(40, path)
    other_model, third = fit(33, path, "another")
    capped, _ = fit(33, path, cap=36)
    return {
        "found": first.changes[-1][1].samples,
        "resumed": [len(samples) for samples in model.ledger],
        "tuned_again": second.changes,
        "finished": second.finished,
        "step_times": (first.step_times, second.step_times),
        "elsewhere": [len(samples) for samples in other_model.ledger],
        "finished_elsewhere": third.finished,
        "capped": {len(samples) for samples in capped.ledger},
    }


class _Named(HeteroDDPStrategy):
    """A strategy whose devices have a given name."""

    def __init__(self, name: str, cap: int | None) -> None:
        super().__init__(max_batch_size=cap)
        self._name = name

    def setup_environment(self) -> None:
        super().setup_environment()
        self.profiles = tuple(replace(profile, name=self._name) for profile in self.profiles)


def test_a_resumed_run_keeps_its_shares_and_does_not_tune_again(ranks: RankPools, tmp_path: Path) -> None:
    for rank, result in enumerate(ranks.run(2, resumed_run, tmp_path, 0.001)):
        assert set(result["resumed"]) == {result["found"][rank]}
        assert result["tuned_again"] == []
        assert result["finished"]
        # the resumed run continues from the step times that were learned
        before, after = ([time.seconds(BATCH_SIZE) for time in times] for times in result["step_times"])
        assert before == pytest.approx(after, rel=0.2)
        assert before
        # on other devices it begins again
        assert result["elsewhere"][0] == BATCH_SIZE
        assert not result["finished_elsewhere"]
        # under a lower limit, the plan is kept as far as the limit allows
        assert result["capped"] == {(36, 28)[rank]}


def run_with_balancer_under_ddp() -> None:
    trainer = make_trainer("ddp", dist.get_world_size(), [LoadBalancer()], max_steps=1)
    trainer.fit(SmallModule(), DataLoader(Numbered(8), batch_size=2))


def test_the_balancer_needs_a_strategy_that_can_divide(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="`LoadBalancer` needs a strategy that can divide batches unequally, got DDPSt"):
        ranks.run(2, run_with_balancer_under_ddp)


def default_callbacks(shares: Any, own: LoadBalancer | None) -> list[str]:
    """Return the names of a run's callbacks, in their order; an asterisk marks ``own``."""
    checkpoint = ModelCheckpoint(save_top_k=0)
    callbacks: list[Callback] = [checkpoint] if own is None else [own, checkpoint]
    trainer = make_trainer(
        HeteroDDPStrategy(shares=shares), dist.get_world_size(), callbacks, max_steps=1, enable_checkpointing=True
    )
    for _ in range(2):
        trainer.fit(SmallModule(), DataLoader(Numbered(8), batch_size=2))
    return [
        type(callback).__name__ + ("*" if callback is own else "")
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    ]


def test_a_default_balancer_is_added_only_if_shares_are_auto_and_there_is_none(ranks: RankPools) -> None:
    assert ranks.run(2, default_callbacks, "auto", None)[0] == ["LoadBalancer", "ModelCheckpoint"]
    own = LoadBalancer(tune_steps=8)
    assert [name.rstrip("*") for name in ranks.run(2, default_callbacks, "auto", own)[0]] == [
        "LoadBalancer",
        "ModelCheckpoint",
    ]
    assert ranks.run(2, default_callbacks, [1, 2], None)[0] == ["ModelCheckpoint"]
