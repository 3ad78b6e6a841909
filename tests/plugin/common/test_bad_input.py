"""Bad input is one clear error that names argument, rule, value and way out, before any process is launched."""

# ruff: noqa: E501  # one case a line reads better
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_hetero import (
    HeteroDDPStrategy,
    HeteroPipelineStrategy,
    LargestBatchFinder,
    LoadBalancer,
    PipelineRecorder,
)
from lightning_hetero.balance.types import BatchPlan, PlanSchedule
from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.testing import SlowDown, SlowLayers

NAN, INF, HUGE = float("nan"), float("inf"), 10**400


def children() -> set[str]:
    """Return the processes that this one has started and that still run."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def _nothing_is_launched() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before
    assert not dist.is_initialized()


def refused(make: Callable[[], Any], message: str) -> None:
    """Check that the error says ``message``, in which ... stands for anything, and that it is the only error."""
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert re.search(".*".join(map(re.escape, message.split("..."))), str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", "?"))


# ---- values that are wrong whatever the rest is -----------------------------------------------------------------------

SHARES = '`shares` must be "auto", one positive number per rank, or a mapping from device name to number, got '
WHOLE = "must be an integer of at least"
CAP = "must be a positive integer, one per rank, or one per device name, got "
POSITIVE = "must be a finite positive number, got "
SPLITS = '`splits` must be "auto", or a list with the first layer of every stage but the first, got '
RECORD = "`record` must be true, false, or the path of a directory, got "

DDP: list[tuple[dict[str, Any], str]] = [
    ({"shares": "fast"}, SHARES + "'fast'. Use \"auto\" to have the shares found, or a list such as [1, 2]."),
    ({"shares": 2}, SHARES + "2. For example [1, 2] gives rank 1 twice the samples of rank 0."),
    ({"shares": None}, SHARES + "None"),
    ({"shares": True}, SHARES + "True"),
    ({"shares": {1, 2}}, SHARES + "{1, 2}"),
    ({"shares": b"12"}, SHARES + "b'12'"),
    ({"shares": np.ones(2)}, SHARES + "array([1., 1.])"),
    ({"shares": [1, 0]}, f"`shares[1]` {POSITIVE}0. To exclude a rank, remove it from `devices`."),
    ({"shares": [-1, 2]}, f"`shares[0]` {POSITIVE}-1"),
    ({"shares": [1, NAN]}, f"`shares[1]` {POSITIVE}nan"),
    ({"shares": [1, INF]}, f"`shares[1]` {POSITIVE}inf"),
    ({"shares": [1, -INF]}, f"`shares[1]` {POSITIVE}-inf"),
    ({"shares": [HUGE, 1]}, f"`shares[0]` {POSITIVE}1000"),
    ({"shares": [1, "2"]}, f"`shares[1]` {POSITIVE}'2'"),
    ({"shares": [1, True]}, f"`shares[1]` {POSITIVE}True"),
    ({"shares": [1, None]}, f"`shares[1]` {POSITIVE}None"),
    ({"shares": [1, 2j]}, f"`shares[1]` {POSITIVE}2j"),
    ({"shares": [[1, 2]]}, f"`shares[0]` {POSITIVE}[1, 2]"),
    ({"shares": {}}, "`shares` must name at least one device, got an empty mapping."),
    ({"shares": {"Tesla K80": 0}}, f"`shares['Tesla K80']` {POSITIVE}0"),
    ({"shares": {"Tesla K80": "2"}}, f"`shares['Tesla K80']` {POSITIVE}'2'"),
    ({"shares": {0: 1}}, "`shares` must map device names to numbers, got the name 0."),
    ({"global_batch_size": 0}, f"`global_batch_size` {WHOLE} 1, got 0."),
    ({"global_batch_size": -64}, f"`global_batch_size` {WHOLE} 1, got -64."),
    ({"global_batch_size": 1.5}, f"`global_batch_size` {WHOLE} 1, got 1.5."),
    ({"global_batch_size": 64.0}, f"`global_batch_size` {WHOLE} 1, got 64.0."),
    ({"global_batch_size": "64"}, f"`global_batch_size` {WHOLE} 1, got '64'."),
    ({"global_batch_size": NAN}, f"`global_batch_size` {WHOLE} 1, got nan."),
    ({"global_batch_size": INF}, f"`global_batch_size` {WHOLE} 1, got inf."),
    ({"global_batch_size": True}, f"`global_batch_size` {WHOLE} 1, got True."),
    ({"global_batch_size": [64]}, f"`global_batch_size` {WHOLE} 1, got [64]."),
    ({"max_batch_size": 0}, f"`max_batch_size` {CAP}0."),
    ({"max_batch_size": [4, -4]}, f"`max_batch_size` {CAP}[4, -4]."),
    ({"max_batch_size": "8"}, f"`max_batch_size` {CAP}'8'."),
    ({"max_batch_size": NAN}, f"`max_batch_size` {CAP}nan."),
    ({"max_batch_size": [8, INF]}, f"`max_batch_size` {CAP}[8, inf]."),
    ({"max_batch_size": True}, f"`max_batch_size` {CAP}True."),
    ({"max_batch_size": [8, None]}, f"`max_batch_size` {CAP}[8, None]."),
    ({"max_batch_size": {}}, "`max_batch_size` must name at least one device, got an empty mapping."),
    ({"max_batch_size": {"Tesla K80": 0}}, f"`max_batch_size` {CAP}{{'Tesla K80': 0}}."),
    ({"max_batch_size": {0: 4}}, "`max_batch_size` must map device names to numbers, got the name 0."),
    (
        {"max_batch_size": 4, "batch_multiple": 8},
        "`max_batch_size` must be at least `batch_multiple` (8), got 4. Raise it or lower `batch_multiple`.",
    ),
    (
        {"max_batch_size": [16, 4], "batch_multiple": 8},
        "`max_batch_size` must be at least `batch_multiple` (8), got 4.",
    ),
    ({"micro_batch_size": 1.5}, f"`micro_batch_size` {CAP}1.5."),
    ({"micro_batch_size": 0}, f"`micro_batch_size` {CAP}0."),
    ({"micro_batch_size": -2}, f"`micro_batch_size` {CAP}-2."),
    ({"micro_batch_size": "all"}, f"`micro_batch_size` {CAP}'all'."),
    ({"micro_batch_size": [True, 4]}, f"`micro_batch_size` {CAP}[True, 4]."),
    ({"micro_batch_size": {3: 4}}, "`micro_batch_size` must map device names to numbers, got the name 3."),
    ({"micro_batch_size": {"K80": 4.0}}, f"`micro_batch_size` {CAP}{{'K80': 4.0}}."),
    ({"batch_multiple": 0}, f"`batch_multiple` {WHOLE} 1, got 0."),
    ({"batch_multiple": -8}, f"`batch_multiple` {WHOLE} 1, got -8."),
    ({"batch_multiple": None}, f"`batch_multiple` {WHOLE} 1, got None."),
    ({"batch_multiple": 8.0}, f"`batch_multiple` {WHOLE} 1, got 8.0."),
    ({"batch_multiple": True}, f"`batch_multiple` {WHOLE} 1, got True."),
    ({"batch_multiple": [8, 8]}, f"`batch_multiple` {WHOLE} 1, got [8, 8]."),
    ({"loss_reduction": "max"}, "`loss_reduction` must be one of 'mean', 'sum', got 'max'."),
    ({"loss_reduction": None}, "`loss_reduction` must be one of 'mean', 'sum', got None."),
    ({"loss_reduction": ["mean"]}, "`loss_reduction` must be one of 'mean', 'sum', got ['mean']."),
    ({"loss_reduction": np.array(["mean", "sum"])}, "`loss_reduction` must be one of 'mean', 'sum', got array("),
    ({"num_loss_terms": 3}, "`num_loss_terms` must be a function that takes a batch, or None, got 3."),
    ({"num_loss_terms": "count"}, "`num_loss_terms` must be a function that takes a batch, or None, got 'count'."),
    (
        {"num_loss_terms": len, "loss_reduction": "sum"},
        '`num_loss_terms` must be None with `loss_reduction="sum"`: a sum is not averaged over terms.',
    ),
    # what is passed on
    ({"share": [1, 2]}, "`share` must be an argument of HeteroDDPStrategy, ... name. Did you mean `shares`?"),
    ({"max_batch": 8}, "`max_batch` must be an argument of ... Did you mean `max_batch_size`?"),
    ({"micro_batch_sizes": [8, 8]}, "`micro_batch_sizes` must be ... Did you mean `micro_batch_size`?"),
    ({"find_unused_parameter": True}, "`find_unused_parameter` must ... Did you mean `find_unused_parameters`?"),
    ({"startmethod": "spawn"}, "`startmethod` must be ... Did you mean `start_method`?"),
    ({"xyz": 1}, "`xyz` must be an argument of HeteroDDPStrategy, ... It takes shares, global_batch_size, max_batch_"),
    ({"module": None}, "`module` must not be given to HeteroDDPStrategy: Lightning passes it itself."),
    ({"device_ids": [0]}, "`device_ids` must not be given to HeteroDDPStrategy: Lightning passes it itself."),
    (
        {"timeout": 60},
        "`timeout` must be a positive datetime.timedelta or None, got 60. For example timedelta(minutes=5).",
    ),
    ({"timeout": timedelta(0)}, "`timeout` must be a positive datetime.timedelta or None, got datetime.timedelta(0)."),
    ({"timeout": timedelta(seconds=-1)}, "`timeout` must be a positive datetime.timedelta or None"),
    ({"start_method": "thread"}, "`start_method` must be one of 'popen', 'spawn', 'fork', 'forkserver', got 'thread'."),
    ({"start_method": None}, "`start_method` must be one of 'popen', ... got None."),
    ({"process_group_backend": 1}, '`process_group_backend` must be a name such as "gloo" or None, got 1.'),
    ({"process_group_backend": ""}, "`process_group_backend` must be a name such as \"gloo\" or None, got ''."),
]
PIPELINE: list[tuple[dict[str, Any], str]] = [
    ({"splits": 4}, SPLITS + "4. For example, [4] makes two stages, the first with four layers."),
    ({"splits": "even"}, SPLITS + "'even'."),
    ({"splits": None}, SPLITS + "None."),
    ({"splits": [4.0]}, SPLITS + "[4.0]."),
    ({"splits": [True]}, SPLITS + "[True]."),
    ({"splits": np.array([4, 8])}, SPLITS + "array([4, 8])."),
    ({"splits": [0]}, "`splits` must be positive and strictly increasing, got [0]."),
    ({"splits": [-3]}, "`splits` must be positive and strictly increasing, got [-3]."),
    ({"splits": [4, 4]}, "`splits` must be positive and strictly increasing, got [4, 4]."),
    ({"splits": [8, 4]}, "`splits` must be positive and strictly increasing, got [8, 4]."),
    ({"speeds": 2}, "`speeds` must be one positive number per rank, got 2. For example [1, 2]."),
    ({"speeds": []}, "`speeds` must be one positive number per rank, got []."),
    ({"speeds": "12"}, "`speeds` must be one positive number per rank, got '12'."),
    ({"speeds": {"K80": 1}}, "`speeds` must be one positive number per rank, got {'K80': 1}."),
    ({"speeds": [1, 0]}, f"`speeds[1]` {POSITIVE}0."),
    ({"speeds": [NAN, 1]}, f"`speeds[0]` {POSITIVE}nan."),
    ({"speeds": [True, 1]}, f"`speeds[0]` {POSITIVE}True."),
    (
        {"splits": [4], "speeds": [1, 2]},
        "`speeds` must be None if `splits` says how the layers are divided. Give one.",
    ),
    ({"num_microbatches": 0}, f"`num_microbatches` {WHOLE} 1, got 0."),
    ({"num_microbatches": 2.0}, f"`num_microbatches` {WHOLE} 1, got 2.0."),
    ({"num_microbatches": "4"}, f"`num_microbatches` {WHOLE} 1, got '4'."),
    ({"num_microbatches": True}, f"`num_microbatches` {WHOLE} 1, got True."),
    ({"num_microbatches": NAN}, f"`num_microbatches` {WHOLE} 1, got nan."),
    ({"schedule": "zigzag"}, "`schedule` must be one of 'auto', '1f1b', 'gpipe', 'v', got 'zigzag'."),
    ({"schedule": None}, "`schedule` must be one of 'auto', '1f1b', 'gpipe', 'v', got None."),
    ({"loss_reduction": "none"}, "`loss_reduction` must be one of 'mean', 'sum', got 'none'."),
    ({"num_loss_terms": 7}, "`num_loss_terms` must be a function that takes a batch, or None, got 7."),
    ({"num_loss_terms": len, "loss_reduction": "sum"}, '`num_loss_terms` must be None with `loss_reduction="sum"`'),
    ({"max_memory_bytes": 0}, "`max_memory_bytes` must be a positive integer, or one per rank, got 0."),
    ({"max_memory_bytes": 1e9}, "`max_memory_bytes` must be a positive integer, or one per rank, got 1000000000.0."),
    ({"max_memory_bytes": "1G"}, "`max_memory_bytes` must be a positive integer, or one per rank, got '1G'."),
    (
        {"max_memory_bytes": {"K80": 1}},
        "`max_memory_bytes` must be a positive integer, or one per rank, got {'K80': 1}.",
    ),
    ({"max_memory_bytes": [1, -1]}, "`max_memory_bytes` must be a positive integer, or one per rank, got [1, -1]."),
    ({"verbose": 1}, "`verbose` must be true or false, got 1."),
    ({"num_micro_batches": 4}, "`num_micro_batches` must be ... Did you mean `num_microbatches`?"),
    ({"split": [4]}, "`split` must be an argument of HeteroPipelineStrategy, ... Did you mean `splits`?"),
    ({"timeouts": timedelta(1)}, "`timeouts` must be ... Did you mean `timeout`?"),
    ({"find_unused_parameters": True}, "must not be given to HeteroPipelineStrategy: ranks have different layers"),
    ({"ddp_comm_hook": len}, "`ddp_comm_hook` must not be given to ... so no gradients are averaged."),
    ({"timeout": "1h"}, "`timeout` must be a positive datetime.timedelta or None, got '1h'."),
]
BALANCER: list[tuple[dict[str, Any], str]] = [
    ({"warmup_steps": -1}, f"`warmup_steps` {WHOLE} 0, got -1."),
    ({"warmup_steps": None}, f"`warmup_steps` {WHOLE} 0, got None."),
    ({"warmup_steps": INF}, f"`warmup_steps` {WHOLE} 0, got inf."),
    ({"warmup_steps": True}, f"`warmup_steps` {WHOLE} 0, got True."),
    ({"tune_steps": 0}, f"`tune_steps` {WHOLE} 1, got 0."),
    ({"tune_steps": 2.5}, f"`tune_steps` {WHOLE} 1, got 2.5."),
    ({"tune_steps": "20"}, f"`tune_steps` {WHOLE} 1, got '20'."),
    ({"watch_steps": -10}, f"`watch_steps` {WHOLE} 0, got -10."),
    ({"watch_steps": NAN}, f"`watch_steps` {WHOLE} 0, got nan."),
    ({"watch_steps": False}, f"`watch_steps` {WHOLE} 0, got False."),
    ({"min_gain": -0.1}, "`min_gain` must be a finite number of at least 0, got -0.1."),
    ({"min_gain": NAN}, "`min_gain` must be a finite number of at least 0, got nan."),
    ({"min_gain": INF}, "`min_gain` must be a finite number of at least 0, got inf."),
    ({"min_gain": "5%"}, "`min_gain` must be a finite number of at least 0, got '5%'."),
    ({"min_gain": HUGE}, "`min_gain` must be a finite number of at least 0, got 1000"),
    ({"memory_fraction": 0}, "`memory_fraction` must be a number above 0 and at most 1, got 0."),
    ({"memory_fraction": 92}, "`memory_fraction` must be a number above 0 and at most 1, got 92."),
    ({"memory_fraction": NAN}, "`memory_fraction` must be a number above 0 and at most 1, got nan."),
    ({"memory_fraction": "all"}, "`memory_fraction` must be a number above 0 and at most 1, got 'all'."),
    ({"memory_fraction": True}, "`memory_fraction` must be a number above 0 and at most 1, got True."),
    ({"verbose": "no"}, "`verbose` must be true or false, got 'no'."),
    ({"verbose": None}, "`verbose` must be true or false, got None."),
    ({"progress_bar": 1}, "`progress_bar` must be true or false, got 1."),
    ({"record": None}, RECORD + "None."),
    ({"record": ""}, RECORD + "''."),
    ({"record": 1}, RECORD + "1."),
    ({"record": Path("runs")}, RECORD + "PosixPath('runs')."),
    ({"record": "a\0b"}, RECORD + r"'a\x00b'."),
]
RECORDER: list[tuple[dict[str, Any], str]] = [
    ({"step": -1}, f"`step` {WHOLE} 0, got -1."),
    ({"step": 2.0}, f"`step` {WHOLE} 0, got 2.0."),
    ({"step": None}, f"`step` {WHOLE} 0, got None."),
    ({"step": [2]}, f"`step` {WHOLE} 0, got [2]."),
    ({"record": ""}, RECORD + "''."),
    ({"record": 0}, RECORD + "0."),
]
SLOW_DOWN: list[tuple[dict[str, Any], str]] = [
    ({"factors": []}, "`factors` must be one number per rank, got []. For example [1, 2]."),
    ({"factors": "12"}, "`factors` must be one number per rank, got '12'."),
    ({"factors": 2}, "`factors` must be one number per rank, got 2."),
    ({"factors": None}, "`factors` must be one number per rank, got None."),
    ({"factors": [1, 0.5]}, "`factors[1]` must be a finite number of at least 1, got 0.5."),
    ({"factors": [1, NAN]}, "`factors[1]` must be a finite number of at least 1, got nan."),
    ({"factors": ["1", 2]}, "`factors[0]` must be a finite number of at least 1, got '1'."),
    ({"factors": [1, True]}, "`factors[1]` must be a finite number of at least 1, got True."),
    ({"factors": [1, -2], "seconds_per_sample": 0.1}, "`factors[1]` must be a finite number of at least 0, got -2."),
    ({"factors": [1, 2], "seconds_per_sample": -1}, f"`seconds_per_sample` {POSITIVE}-1."),
    ({"factors": [1, 2], "seconds_per_sample": 0}, f"`seconds_per_sample` {POSITIVE}0."),
    ({"factors": [1, 2], "seconds_per_sample": INF}, f"`seconds_per_sample` {POSITIVE}inf."),
    ({"factors": [1, 2], "seconds_per_sample": "1ms"}, f"`seconds_per_sample` {POSITIVE}'1ms'."),
    (
        {"factors": [1, 2], "overhead_s": 0.1},
        "`overhead_s` must be 0 without `seconds_per_sample`, got 0.1. Give both.",
    ),
    (
        {"factors": [1, 2], "seconds_per_sample": 1, "overhead_s": -1},
        "`overhead_s` must be a finite number of at least 0",
    ),
    (
        {"factors": [1, 2], "seconds_per_sample": 1, "overhead_s": None},
        "`overhead_s` must be a ... at least 0, got None.",
    ),
]
SLOW_LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"factors": []}, "`factors` must be one positive number per rank, got []."),
    ({"factors": "12"}, "`factors` must be one positive number per rank, got '12'."),
    ({"factors": [1, 0]}, f"`factors[1]` {POSITIVE}0."),
    ({"factors": [1, 0.5]}, "`factors[1]` must be a finite number of at least 1, got 0.5."),
    ({"factors": [1, INF]}, f"`factors[1]` {POSITIVE}inf."),
    ({"factors": [1, 2], "seconds_per_sample": 0}, f"`seconds_per_sample` {POSITIVE}0."),
    ({"factors": [1, 2], "seconds_per_sample": "1"}, f"`seconds_per_sample` {POSITIVE}'1'."),
    (
        {"factors": [1, 2], "seconds_per_sample": []},
        "`seconds_per_sample` must be one positive number per layer, got [].",
    ),
    ({"factors": [1, 2], "seconds_per_sample": [0.1, NAN]}, f"`seconds_per_sample[1]` {POSITIVE}nan."),
]
FINDER: list[tuple[dict[str, Any], str]] = [
    ({"verbose": "yes"}, "`verbose` must be true or false, got 'yes'."),
    ({"verbose": 0}, "`verbose` must be true or false, got 0."),
]
TABLES: dict[Any, list[tuple[dict[str, Any], str]]] = {
    HeteroDDPStrategy: DDP,
    HeteroPipelineStrategy: PIPELINE,
    LoadBalancer: BALANCER,
    PipelineRecorder: RECORDER,
    SlowDown: SLOW_DOWN,
    SlowLayers: SLOW_LAYERS,
    LargestBatchFinder: FINDER,
}
CASES = [
    pytest.param(kind, given, message, id=f"{kind.__name__}-{','.join(given)}-{i}")
    for kind, table in TABLES.items()
    for i, (given, message) in enumerate(table)
]


@pytest.mark.parametrize(("kind", "given", "message"), CASES)
def test_is_refused_where_it_is_given(kind: Any, given: dict[str, Any], message: str) -> None:
    refused(lambda: kind(**given), message)


# ---- values that are wrong for this number of ranks --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "given", "message"),
    [
        (
            HeteroDDPStrategy,
            {"shares": [1, 2, 3]},
            "`shares` must have one number per rank (2), got 3: [1, 2, 3]."
            " Add or remove numbers, or set `devices` and `num_nodes` to match.",
        ),
        (HeteroDDPStrategy, {"shares": [1]}, "`shares` must have one number per rank (2), got 1: [1]."),
        (HeteroDDPStrategy, {"shares": []}, "`shares` must have one number per rank (2), got 0: []."),
        (
            HeteroDDPStrategy,
            {"global_batch_size": 1},
            "`global_batch_size` must be at least the number of ranks (2), got 1. Raise it or use fewer devices.",
        ),
        (
            HeteroDDPStrategy,
            {"global_batch_size": 8, "batch_multiple": 8},
            "`global_batch_size` must be at least `batch_multiple` times the number of ranks (8 x 2 = 16), got 8."
            " Raise it, lower `batch_multiple` or use fewer devices.",
        ),
        (
            HeteroDDPStrategy,
            {"max_batch_size": [8, 8, 8]},
            "`max_batch_size` must have one number per rank (2), got 3: [8, 8, 8]."
            " Add or remove numbers, or give one number for all ranks.",
        ),
        (HeteroDDPStrategy, {"max_batch_size": []}, "`max_batch_size` must have one number per rank (2), got 0: []."),
        (
            HeteroDDPStrategy,
            {"max_batch_size": [8, 16], "global_batch_size": 32},
            "`max_batch_size` must together hold the global batch of 32 samples, got [8, 16], which hold 24: 8 too few."
            " Raise the limits or lower `global_batch_size` to 24.",
        ),
        (HeteroDDPStrategy, {"max_batch_size": 8, "global_batch_size": 32}, "got [8, 8], which hold 16: 16 too few."),
        (
            HeteroDDPStrategy,
            {"max_batch_size": np.int64(8), "global_batch_size": 32},
            "which hold 16: 16 too few.",
        ),
        (
            HeteroDDPStrategy,
            {"max_batch_size": [12, 12], "global_batch_size": 24, "batch_multiple": 8},
            "`max_batch_size` must together hold the global batch of 24 samples, got [12, 12], which hold 16 in"
            " multiples of 8: 8 too few.",
        ),
        (
            HeteroDDPStrategy,
            {"micro_batch_size": [8]},
            "`micro_batch_size` must have one number per rank (2), got 1: [8].",
        ),
        (
            HeteroPipelineStrategy,
            {"splits": [2, 4]},
            "`splits` must have one number fewer than there are ranks (2), got 2: [2, 4].",
        ),
        (
            HeteroPipelineStrategy,
            {"splits": []},
            "`splits` must have one number fewer than there are ranks (2), got 0: [].",
        ),
        (
            HeteroPipelineStrategy,
            {"speeds": [1]},
            "`speeds` must have one number per rank (2), got 1: [1]. Add or remove",
        ),
        (
            HeteroPipelineStrategy,
            {"max_memory_bytes": [1, 2, 3]},
            "`max_memory_bytes` must have one number per rank (2), got 3: [1, 2, 3].",
        ),
    ],
)
@pytest.mark.parametrize("where", [{"devices": 2}, {"devices": 1, "num_nodes": 2}], ids=["devices", "nodes"])
def test_is_refused_by_the_trainers_constructor(
    strategy: Any, given: dict[str, Any], message: str, where: dict[str, Any]
) -> None:
    made = strategy(**given)
    refused(lambda: Trainer(accelerator="cpu", strategy=made, logger=False, **where), message)


# ---- plans -----------------------------------------------------------------------------------------------------------

PLAN = BatchPlan((4, 12))


class Running(HeteroDDPStrategy):
    """As if it had drawn the samples of step 5."""

    lightning_module: Any = object()
    plan_schedule = PlanSchedule.constant(BatchPlan((8, 8)))
    fetched_through = 5
    global_rank = 1


@pytest.mark.parametrize(
    ("strategy", "first_step", "plan", "message"),
    [
        (Running, "6", PLAN, f"`first_step` {WHOLE} 0, got '6'."),
        (Running, -1, PLAN, f"`first_step` {WHOLE} 0, got -1."),
        (Running, 6.0, PLAN, f"`first_step` {WHOLE} 0, got 6.0."),
        (Running, NAN, PLAN, f"`first_step` {WHOLE} 0, got nan."),
        (Running, True, PLAN, f"`first_step` {WHOLE} 0, got True."),
        (
            Running,
            5,
            PLAN,
            "`first_step` must be a step that no rank has fetched, got 5, but rank 1 has fetched step 5. Use a later step.",
        ),
        (Running, 6, [4, 12], "`plan` must be a BatchPlan, got [4, 12]. For example BatchPlan((32, 96))."),
        (Running, 6, None, "`plan` must be a BatchPlan, got None."),
        (Running, 6, BatchPlan((4.0, 12.0)), "`plan` must be a BatchPlan, got BatchPlan(samples=(4.0, 12.0))."),  # type: ignore[arg-type]
        (
            Running,
            6,
            BatchPlan((4, 13)),
            "`plan` must divide 16 samples among 2 ranks, got BatchPlan(samples=(4, 13)).",
        ),
        (Running, 6, BatchPlan((4, 4, 8)), "`plan` must divide 16 samples among 2 ranks"),
        (
            HeteroDDPStrategy,
            6,
            PLAN,
            "`change_plan` needs a training loader that this strategy divides; there is none.",
        ),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(strategy: Any, first_step: Any, plan: Any, message: str) -> None:
    refused(lambda: strategy().change_plan(first_step, plan), message)


@pytest.mark.parametrize("samples", [(), (0, 0), (-1, 3)])
def test_a_plan_without_samples_is_none(samples: tuple[int, ...]) -> None:
    refused(lambda: BatchPlan(samples), f"`samples` must hold at least one sample and no negative size, got {samples}.")


# ---- what is right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (HeteroDDPStrategy, {"shares": [np.float32(1), np.int64(2)], "global_batch_size": np.int32(64)}),
        (HeteroDDPStrategy, {"shares": (1, 2), "max_batch_size": [np.int64(8), 4], "micro_batch_size": (2, 2)}),
        (HeteroDDPStrategy, {"find_unused_parameters": True, "static_graph": False, "bucket_cap_mb": 25}),
        (
            HeteroDDPStrategy,
            {"timeout": timedelta(seconds=30), "start_method": "spawn", "process_group_backend": "gloo"},
        ),
        (HeteroDDPStrategy, {"timeout": None, "ddp_comm_hook": len, "model_averaging_period": 3}),
        (HeteroPipelineStrategy, {"splits": [np.int64(4)], "max_memory_bytes": np.int64(10**9)}),
        (HeteroPipelineStrategy, {"speeds": (1, np.float64(2)), "start_method": "spawn"}),
        (LoadBalancer, {"warmup_steps": 0, "min_gain": np.float32(0.1), "watch_steps": 0, "record": "runs"}),
        (SlowDown, {"factors": (0, 2), "seconds_per_sample": np.float64(0.1)}),
        (SlowLayers, {"factors": [0.5, 2], "seconds_per_sample": [0.1, 0.2]}),
    ],
)
def test_what_is_right_is_taken(kind: Any, given: dict[str, Any]) -> None:
    made = kind(**given)
    if isinstance(made, HeteroDDPStrategy | HeteroPipelineStrategy):
        Trainer(accelerator="cpu", devices=2, strategy=made, logger=False)


# ---- from YAML -------------------------------------------------------------------------------------------------------


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])


def from_yaml(kind: Any, given: str, directory: Path) -> None:
    """Construct the Trainer that a YAML file describes; ``given`` is ``key: value`` of one class."""
    path = f"{kind.__module__ if kind in (SlowDown, SlowLayers) else 'lightning_hetero'}.{kind.__name__}"
    made = f"{{class_path: {path}, init_args: {{{given}}}}}"
    key = f"strategy: {made}" if kind in (HeteroDDPStrategy, HeteroPipelineStrategy) else f"callbacks: [{made}]"
    config = directory / "config.yaml"
    config.write_text(f"trainer: {{accelerator: cpu, devices: 2, logger: false, {key}}}\n", encoding="utf-8")
    LightningCLI(Module, run=False, seed_everything_default=False, args=["--config", str(config)])


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (HeteroDDPStrategy, "shares: fast", "shares"),
        (HeteroDDPStrategy, "shares: [1, 0]", f"`shares[1]` {POSITIVE}0"),
        (HeteroDDPStrategy, "shares: [1, 2, 3]", "`shares` must have one number per rank (2), got 3"),
        (HeteroDDPStrategy, "shares: {K80: .nan}", f"`shares['K80']` {POSITIVE}nan"),
        (HeteroDDPStrategy, "share: [1, 2]", "share"),
        (HeteroDDPStrategy, "global_batch_size: many", "global_batch_size"),
        (HeteroDDPStrategy, "max_batch_size: [8, -8]", f"`max_batch_size` {CAP}[8, -8]"),
        (HeteroDDPStrategy, "micro_batch_size: 0", f"`micro_batch_size` {CAP}0"),
        (HeteroDDPStrategy, "batch_multiple: 0", f"`batch_multiple` {WHOLE} 1, got 0"),
        (HeteroDDPStrategy, "loss_reduction: max", "loss_reduction"),
        (HeteroDDPStrategy, "num_loss_terms: 4", "num_loss_terms"),
        (HeteroDDPStrategy, "start_method: thread", "start_method"),
        (
            HeteroPipelineStrategy,
            "splits: [4, 8]",
            "`splits` must have one number fewer than there are ranks (2), got 2",
        ),
        (HeteroPipelineStrategy, "splits: even", "splits"),
        (HeteroPipelineStrategy, "'splits': [4], 'speeds': [1, 2]", "`speeds` must be None if `splits` says"),
        (HeteroPipelineStrategy, "speeds: [1, -1]", f"`speeds[1]` {POSITIVE}-1"),
        (HeteroPipelineStrategy, "num_microbatches: 0", f"`num_microbatches` {WHOLE} 1, got 0"),
        (HeteroPipelineStrategy, "schedule: zigzag", "schedule"),
        (HeteroPipelineStrategy, "loss_reduction: none", "loss_reduction"),
        (HeteroPipelineStrategy, "num_loss_terms: 4", "num_loss_terms"),
        (
            HeteroPipelineStrategy,
            "max_memory_bytes: [1]",
            "`max_memory_bytes` must have one number per rank (2), got 1",
        ),
        (HeteroPipelineStrategy, "verbose: loudly", "verbose"),
        (LoadBalancer, "warmup_steps: -1", f"`warmup_steps` {WHOLE} 0, got -1"),
        (LoadBalancer, "tune_steps: 0.5", "tune_steps"),
        (LoadBalancer, "min_gain: .inf", "`min_gain` must be a finite number of at least 0, got inf"),
        (LoadBalancer, "memory_fraction: 92", "`memory_fraction` must be a number above 0 and at most 1, got 92"),
        (LoadBalancer, "watch_steps: -1", f"`watch_steps` {WHOLE} 0, got -1"),
        (LoadBalancer, "record: ''", RECORD + "''"),
        (LoadBalancer, "verbose: loudly", "verbose"),
        (LoadBalancer, "progress_bar: 3", "progress_bar"),
        (LargestBatchFinder, "verbose: loudly", "verbose"),
        (PipelineRecorder, "step: -1", f"`step` {WHOLE} 0, got -1"),
        (PipelineRecorder, "record: [a]", "record"),
        (SlowDown, "factors: [1, 0.5]", "`factors[1]` must be a finite number of at least 1, got 0.5"),
        (SlowDown, "'factors': [1, 2], 'seconds_per_sample': 0", f"`seconds_per_sample` {POSITIVE}0"),
        (SlowDown, "'factors': [1, 2], 'overhead_s': 1", "`overhead_s` must be 0 without `seconds_per_sample`, got 1"),
        (SlowLayers, "factors: []", "`factors` must be one positive number per rank, got []"),
        (SlowLayers, "'factors': [1, 2], 'seconds_per_sample': -1", f"`seconds_per_sample` {POSITIVE}-1"),
    ],
)
def test_is_refused_from_yaml(
    kind: Any, given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What breaks the declared type, the parser answers with the name of the key; all else is answered as in Python."""
    with pytest.raises((ValueError, SystemExit)) as caught:  # the parser wraps errors of constructors in one of its own
        from_yaml(kind, given, tmp_path)
    said = str(caught.value) if isinstance(caught.value, ValueError) else capsys.readouterr().err
    assert message in said, said
    assert "Traceback" not in said


def test_what_is_right_is_taken_from_yaml(tmp_path: Path) -> None:
    from_yaml(HeteroDDPStrategy, "shares: [1, 2]", tmp_path)
    from_yaml(HeteroPipelineStrategy, "splits: [1]", tmp_path)
    from_yaml(SlowLayers, "factors: [1, 2]", tmp_path)
