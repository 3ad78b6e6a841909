"""From measurements of all ranks to stages and replicas, and what is printed of them; without ranks."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from replica_trainings import FEATURES
from torch import nn

from lightning_hetero.distributed.pipeline.layer_profile import LayerProfile
from lightning_hetero.distributed.pipeline.passes import copies
from lightning_hetero.plugin.pipeline import planning as stages
from lightning_hetero.plugin.pipeline.refusals import why_one_pipeline
from lightning_hetero.plugin.pipeline.replicas import planning
from lightning_hetero.plugin.pipeline.replicas.planning import Wanted, first_replicas

LAYERS = 4


def test_given_speeds_divide_samples_and_layers_before_anything_is_timed() -> None:
    """Two replicas of four ranks: equal sums of speeds get about equal samples, and fast ranks have most layers."""
    plan = first_replicas(6, 4, Wanted(2, 2, "1f1b"), [2.0, 1.0, 2.0, 1.0], None)
    assert [replica.share for replica in plan.replicas] == pytest.approx([128.0, 128.0], rel=0.1)
    for replica in plan.replicas:
        layers = {rank: len(replica.stages.layers_of(replica.ranks.index(rank))) for rank in replica.ranks}
        assert sum(layers.values()) == 6
        assert max(layers, key=layers.__getitem__) in (0, 2)


def row(budget: float, seconds: float) -> list[float]:
    """Return what a rank has measured: layers of 10 bytes of parameters, and 100 of activations per micro-batch."""
    times, sizes = (seconds,) * LAYERS, (0,) * LAYERS
    profile = LayerProfile(
        forward_s=times,
        backward_s=times,
        parameter_bytes=(10,) * LAYERS,
        constant_bytes=sizes,
        activations_bytes=(100,) * LAYERS,
        boundary_bytes=sizes,
        input_s=(0.0,) * LAYERS,
        weight_s=(0.0,) * LAYERS,
        can_be_shared=(False,) * LAYERS,
        copy_s=(0.0,) * LAYERS,
        transfer_s=0.0,
    )
    return [budget, 1.0, 0.0, 0.0, 0.0, 0.0, *profile.to_numbers()]


def test_layers_that_one_rank_cannot_split_are_whole_for_all() -> None:
    """Also in the prediction, which would otherwise be better than what runs."""
    halves, wholes = (0.005, 0.005, 0.005, 0.005), (0.005, 0.005, 0.0, 0.005)
    rows = []
    for weights in (halves, wholes):
        numbers = LayerProfile.from_numbers(row(inf, 0.01)[6:])
        inputs = tuple(0.01 - w for w in weights)
        rows.append([inf, 0.0, *replace(numbers, input_s=inputs, weight_s=weights).to_numbers()])
    example: Any = SimpleNamespace(samples=8, size=1.0, micro_batches=8, training=True)
    found = stages._decision(0, example, "auto", 8, 2.0)(rows)
    assert found.split_layers == (0, 1, 3)
    assert found.costs.weight_s == (wholes, wholes)
    assert found.costs.input_s == ((0.005, 0.005, 0.01, 0.005),) * 2
    example.training = False
    evaluated = stages._decision(0, example, "auto", 8, 2.0)(rows)
    assert evaluated.costs.backward_s == ((0.0,) * LAYERS,) * 2


def decided(*budgets: float) -> list[list[int]]:
    """Return the ranks of the replicas, of any number, for the budgets of equally fast ranks."""
    example: Any = SimpleNamespace(samples=8, size=4.0)
    rows = [row(budget, 0.01) for budget in budgets]
    found = planning._decided([0] * len(budgets), [example], Wanted("auto", 1, "gpipe"), 2.0, rows)
    return [sorted(replica.ranks) for replica in found.plan.replicas]


def test_ranks_without_memory_for_all_layers_form_pipelines() -> None:
    """A layer needs 10 bytes five times with Adam, and 100 for each four samples: four layers 600 with four of them."""
    assert decided(inf, inf) == [[0], [1]]
    assert decided(600.0, 600.0) == [[0], [1]]
    assert decided(1000.0, 500.0) == [[0], [1]], "with three samples on the smaller one"
    assert decided(1000.0, 250.0) == [[0, 1]], "which cannot even hold one"


def test_sparse_gradients_are_a_reason_for_one_pipeline() -> None:
    module: Any = nn.Sequential(nn.Embedding(4, FEATURES, sparse=True), nn.Linear(FEATURES, 1))
    reason = why_one_pipeline(module)
    assert reason is not None
    assert "'0' with `sparse=True`" in reason
    module[0].weight.requires_grad_(False)
    assert why_one_pipeline(module) is None, "what is not trained has no gradients"
    module[0] = nn.Embedding(4, FEATURES)
    assert why_one_pipeline(module) is None


def test_gradients_are_added_up_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one type each, of some size, and together they hold each parameter once."""
    monkeypatch.setattr(copies, "_BUCKET_BYTES", 32)
    parameters = [nn.Parameter(torch.zeros(n, dtype=t)) for n in (3, 5, 4) for t in (torch.float32, torch.float64)]
    buckets = [*copies._by_kind(parameters)]
    assert sorted(id(p) for bucket in buckets for p in bucket) == sorted(map(id, parameters))
    for bucket in buckets:
        assert len({p.dtype for p in bucket}) == 1
        assert sum(p.numel() * p.element_size() for p in bucket[:-1]) < 32
