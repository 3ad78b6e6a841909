"""Layers move between steps, and the training remains that of one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankPools
from profiles import thorough
from stage_trainings import FOUND, OPTIONS, THREE, TWO, VALIDATED, Deep, Found, alone, train
from training import assert_close, flat

from lightning_hetero.balance.pipeline.stages import StagePlan


@pytest.mark.parametrize(
    ("plans", "optimizer", "options"),
    [
        (TWO, "adamw", VALIDATED),
        (THREE, "sgd", OPTIONS),
        pytest.param(TWO, "sgd", OPTIONS, marks=thorough),
        pytest.param(THREE, "adamw", OPTIONS, marks=thorough),
        pytest.param(THREE, "adamw", {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, marks=thorough),
    ],
)
def test_parameters_are_those_of_one_device(
    ranks: RankPools, plans: list[StagePlan], optimizer: str, options: dict[str, Any]
) -> None:
    """With tied and frozen layers, counts in a layer, and hooks that look at what earlier steps have left."""
    expected = alone(optimizer, 15, options)
    for outcome in ranks.run(plans[0].num_stages, train, plans, optimizer, 15, options):
        assert_close(outcome.parameters, flat(expected))
        assert [plan for _, plan in outcome.changes] == plans
        every = options.get("accumulate_grad_batches", 1)
        assert all(step % every == 0 for step, _ in outcome.changes)
        assert_close(outcome.norms, expected.norms)
        assert outcome.calls >= 4 * 15 * every  # on whichever ranks the layer was
        assert not outcome.warnings
        if "val_check_interval" in options:
            assert outcome.metrics["val_loss"] == pytest.approx(float(expected.trainer.callback_metrics["val_loss"]))


def test_layers_that_were_found_move(ranks: RankPools) -> None:
    expected = alone("adamw", 12, module_of=Found)
    for outcome in ranks.run(2, train, FOUND, "adamw", 12, {}, None, None, Found):
        assert_close(outcome.parameters, flat(expected))
        assert [plan for _, plan in outcome.changes] == FOUND
        assert not outcome.warnings


def test_a_checkpoint_after_a_move_is_that_of_one_device(ranks: RankPools, tmp_path: Path) -> None:
    path = tmp_path / "moved.ckpt"
    ranks.run(2, train, TWO[:3], "adamw", 12, {}, (10, path))
    saved = torch.load(path, weights_only=False)
    before = alone("adamw", 11)
    module = Deep()
    module.load_state_dict(saved["state_dict"])
    assert_close(flat(module), flat(before))
    (optimizer,) = [module.configure_optimizers()["optimizer"]]
    optimizer.load_state_dict(saved["optimizer_states"][0])
    expected: Any = before.optimizers()
    for own, other in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert own.keys() == other.keys()
        assert all(torch.allclose(own[name], other[name], rtol=0, atol=1e-10) for name in own)
    parameters = flat(alone("adamw", 30))
    for outcome in ranks.run(3, train, THREE[:2], "adamw", 30, {}, None, path):
        assert_close(outcome.parameters, parameters)
        assert len(outcome.changes) == 2
