"""Gradients and activations pass through the devices' backend, and everything else through a group of the hosts.

gloo plays the devices' backend, so that every call through it can be recorded, also those that DDP makes in C++.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools, free_port
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from recording_backend import NAME, Call, recorded
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError
from training import FEATURES, Numbered, flat, make_trainer

from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy
from lightning_hetero.distributed.host_group import has_own_group, host_group
from lightning_hetero.distributed.pipeline.passes import links
from lightning_hetero.plugin.common.base_strategy import BaseStrategy

WIDTH, STEPS, SAVED, BATCH = 60, 48, 40, 8
GRADIENTS = 8 * ((FEATURES + 1) * WIDTH + (WIDTH + 1) * WIDTH + WIDTH + 1)
ACTIVATIONS = 8 * WIDTH * BATCH // 4  # of one of four micro-batches
Calls = Counter[tuple[str, str, int]]


class Deep(LightningModule):
    """Logs, computes metrics and keeps running statistics; its parameters are larger than any number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))
        self.model.double()
        self.error = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, features, targets = batch
        output = self.model(features)
        loss = nn.functional.mse_loss(output, targets)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("alone", loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, features, targets = batch
        output = self.model(features)
        self.error(output, targets)
        self.log("error", self.error)
        self.log("val_loss", nn.functional.mse_loss(output, targets), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Phases(Callback):
    """Names the phase of every call: what happens between the ends of two batches belongs to a step."""

    def __init__(self, record: Any) -> None:
        self.record = record

    def on_train_start(self, *_: Any) -> None:
        self.record.phase = "step 0"

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.record.phase = f"step {trainer.fit_loop.total_batch_idx + 1}"

    def on_validation_start(self, *_: Any) -> None:
        self.record.phase = "validation"

    def on_train_epoch_end(self, *_: Any) -> None:
        self.record.phase = "end of an epoch"

    def on_train_end(self, *_: Any) -> None:
        self.record.phase = "end"


def terms(batch: Any) -> float:
    return float(len(batch[0]))


def train(strategy: BaseStrategy, ports: tuple[int, int], folder: Path) -> tuple[list[Call], list[float]]:
    with recorded(ports) as record:
        of_ranks = 2 if isinstance(strategy, HeteroDDPStrategy) else 1
        module = Deep()
        trainer = make_trainer(
            strategy,
            2,
            [
                Phases(record),
                ModelCheckpoint(folder, every_n_train_steps=SAVED),
                EarlyStopping("val_loss", patience=100),
            ],
            max_steps=STEPS,
            limit_val_batches=1.0,
            gradient_clip_val=0.5,
            enable_checkpointing=True,
        )
        data = DataLoader(Numbered(BATCH * STEPS), BATCH // of_ranks, shuffle=True)
        trainer.fit(module, data, DataLoader(Numbered(20), 5))
        calls = [*record.calls]
        assert dist.get_backend() == NAME
        assert has_own_group()
    assert not has_own_group()  # it ended with the group that it was made for
    assert host_group() is dist.group.WORLD
    return calls, flat(module)


def of_steps(calls: list[Call]) -> tuple[Calls, dict[str, Calls]]:
    """Return the calls of an ordinary step, that is of most steps, and those of all other phases."""
    phases: dict[str, Calls] = {}
    for call in calls:
        if call.in_main_thread:  # the thread that receives batches runs whenever it can
            phases.setdefault(call.phase, Counter())[call.group, call.name, call.bytes] += 1
    steps = [frozenset(found.items()) for phase, found in phases.items() if phase.startswith("step")]
    (ordinary, times), *_ = Counter(steps).most_common(1)
    assert times > STEPS / 2
    return Counter(dict(ordinary)), {p: found for p, found in phases.items() if frozenset(found.items()) != ordinary}


def check_device_group(calls: list[Call], largest: int) -> None:
    """Fail if an object, or something larger than gradients or activations, has passed through the devices' group."""
    # DDP compares and broadcasts parameters before the training; the profile of layers sends messages of the size of
    # activations, and the link is timed
    timed = (ACTIVATIONS, links._SMALL_BYTES, links._LARGE_BYTES)
    for call in calls:
        if call.group == "device" and call.phase:
            if call.of_bytes:
                assert (call.phase, call.name in ("send", "recv"), call.bytes in timed) == ("step 0", True, True), call
                continue
            assert call.bytes <= largest, call
            assert call.in_main_thread or call.name == "allreduce", call  # DDP's, in autograd's thread
            assert call.name != "barrier" or call.phase == "validation", call  # there by torchmetrics


def through_ddp(ports: tuple[int, int], folder: Path, counts_terms: bool) -> Any:
    strategy = HeteroDDPStrategy(num_loss_terms=terms if counts_terms else None, process_group_backend=NAME)
    return train(strategy, ports, folder)


@pytest.mark.parametrize("counts_terms", [False, True])
def test_ddp_exchanges_gradients_and_nothing_else(ranks: RankPools, tmp_path: Path, counts_terms: bool) -> None:
    found = ranks.run(2, through_ddp, (free_port(), free_port()), tmp_path, counts_terms, timeout_s=120)
    for calls, _ in found:
        check_device_group(calls, GRADIENTS)
        ordinary, others = of_steps(calls)
        expected = Counter({("device", "allreduce", GRADIENTS): 1, ("host", "broadcast", 8): 1})  # Lightning: SIGTERM?
        if counts_terms:
            expected["host", "allreduce", 16] = 1
        assert ordinary == expected
        # steps that are more: the first two, in which DDP agrees on its buckets, one in which a checkpoint is saved,
        # and those that end a window
        steps = [phase for phase in others if phase.startswith("step")]
        windows = [p for p in steps if [size for _, name, size in others[p] if name == "broadcast" and size > 100]]
        assert {*steps} - {*windows} <= {"step 0", "step 1", f"step {SAVED - 1}", f"step {SAVED}"}
        assert 0 < len(windows) < STEPS / 4
    assert found[0][1] == found[1][1]


def through_pipeline(ports: tuple[int, int], folder: Path) -> Any:
    strategy = HeteroPipelineStrategy(process_group_backend=NAME, verbose=False)
    found = train(strategy, ports, folder)
    assert strategy._watcher is not None
    assert strategy._watcher._exchange_s > 0, "by which the next window is chosen, to take a hundredth of the time"
    return found


def test_a_pipeline_exchanges_activations_and_gradients_and_nothing_else(ranks: RankPools, tmp_path: Path) -> None:
    found = ranks.run(2, through_pipeline, (free_port(), free_port()), tmp_path, timeout_s=120)
    (first, _), (second, _) = found
    for calls, _ in found:
        check_device_group(calls, ACTIVATIONS)
        ordinary, others = of_steps(calls)
        of_device = {(name, size): n for (group, name, size), n in ordinary.items() if group == "device"}
        norm = ("allreduce", 8)
        assert of_device == {("send", ACTIVATIONS): 4, ("recv", ACTIVATIONS): 4, norm: 1}
        # whether SIGTERM has come, and the output of the step with its size
        assert sum(n for (group, name, _), n in ordinary.items() if (group, name) == ("host", "broadcast")) == 3
        # after the last: the hooks of the epoch
        known = {"step 0", f"step {SAVED - 1}", f"step {SAVED}", f"step {STEPS}"}
        windows = [phase for phase in others if phase.startswith("step") and phase not in known]
        assert 0 < len(windows) < STEPS / 10  # in which ranks tell each other how long their passes take
        for phase in windows:
            assert {(name, size): n for (g, name, size), n in others[phase].items() if g == "device"} == of_device
    # a batch: what follows, and its three tensors
    ordinary, _ = of_steps(first)
    sent = {size: n for (group, name, size), n in ordinary.items() if (group, name) == ("host", "send")}
    assert sent == {16: 1, 8 * BATCH: 2, 8 * BATCH * FEATURES: 1}
    assert not [
        call
        for call in second
        if call.name == "recv" and call.group == "host" and call.bytes == 8 * BATCH and call.in_main_thread
    ]
    assert found[0][1] == found[1][1]


class Ended(Callback):
    """Ends rank 0 by SIGTERM within a step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)


def end_by_signal(ports: tuple[int, int]) -> tuple[str, int, set[str]]:
    with recorded(ports) as record:
        trainer = make_trainer(HeteroDDPStrategy(process_group_backend=NAME), 2, [Ended()], max_steps=STEPS)
        try:
            trainer.fit(Deep(), DataLoader(Numbered(8 * STEPS), 4))
        except SystemExit as error:
            ended = type(error).__name__
        return ended, trainer.global_step, {call.name for call in record.calls if call.group == "device"}


def test_a_signal_to_one_rank_ends_all(ranks: RankPools) -> None:
    for ended, steps, of_device in ranks.run(2, end_by_signal, (free_port(), free_port()), timeout_s=60):
        assert (ended, steps) == ("SIGTERMException", 3)
        assert of_device == {"allgather", "broadcast", "allreduce"}
