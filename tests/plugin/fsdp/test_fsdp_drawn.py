"""Trainings with shards that nobody chose, on real gloo ranks, each compared with `hetero_ddp`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness import RankPools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import drawn
from shard_models import MODELS
from shard_trainings import InfiniteStandIn, check, differences

TRAININGS = drawn(2, 120)
# DDP itself trains no blocks that are checkpointed reentrantly; the engine's tests compare them with one device
NAMES = [name for name in MODELS if "reentrantly" not in name and name != "mixed types"]


@dataclass(frozen=True)
class Case:
    """A drawn case."""

    world_size: int
    model: str
    optimizer: str
    ddp: dict[str, Any] = field(default_factory=dict)
    fsdp: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world_size = draw(st.sampled_from([2, 2, 3]))

    def per_rank(number: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(number, min_size=world_size, max_size=world_size))

    weights = per_rank(st.integers(0, 5))
    clipping: dict[str, Any] = draw(
        st.sampled_from(
            [{}, {"gradient_clip_val": 0.2}, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}]
        )
    )
    return Case(
        world_size=world_size,
        model=draw(st.sampled_from(NAMES)),
        optimizer=draw(st.sampled_from(["SGD", "AdamW"])),
        ddp={"shares": per_rank(st.integers(1, 9))},
        fsdp={
            "shard_weights": weights if any(weights) else "auto",
            "find_unused_parameters": draw(st.booleans()),
            "reshard_after_forward": draw(st.booleans()),
            "reduce_every_batch": draw(st.booleans()),
        },
        options={
            "max_steps": draw(st.integers(1, 12)),
            "batch_size": draw(st.integers(1, 9)),
            "accumulate_grad_batches": draw(st.integers(1, 3)),
            "limit_val_batches": draw(st.integers(0, 1)),
            **clipping,
        },
    )


def of_case(case: Case) -> list[tuple[str, dict[str, float]]]:
    kind = partial(InfiniteStandIn, optimizer=case.optimizer)
    options = dict(case.options)
    return [(str(case), differences(kind, MODELS[case.model], case.ddp, case.fsdp, case.world_size, options))]


def test_drawn_trainings(ranks: RankPools) -> None:
    done: list[Case] = []

    @settings(max_examples=TRAININGS, suppress_health_check=list(HealthCheck), deadline=None)
    @given(cases())
    def trained(case: Case) -> None:
        done.append(case)
        check(ranks.run(case.world_size, of_case, case))

    trained()
    assert len(done) >= TRAININGS
