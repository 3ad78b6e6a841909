"""The checks on CPU ranks: each passes, and fails with a fault that it has to find."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from batch_norm_kernels import synchronised_on_cpu
from command.check import broken
from harness import RankPools
from profiles import thorough

from lightning_hetero.command.check import runner
from lightning_hetero.command.check.catalogue import CHECKS, Check
from lightning_hetero.command.check.children import clocks, environment, exactness, memory, pipeline
from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.finding import Finding
from lightning_hetero.command.check.layout import CPU, Layout
from lightning_hetero.command.check.runner import run_check
from lightning_hetero.command.check.summary import line
from lightning_hetero.command.main import main
from lightning_hetero.exceptions import RankOutOfMemoryError
from lightning_hetero.plugin.common import base_strategy

TESTS = Path(__file__).parents[2]

Function = Callable[[Rank], Finding]


@pytest.fixture(autouse=True)
def _found_by_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))


# ---- on the ranks that all tests share -------------------------------------------------------------------------------


def on_ranks(function: Function, folder: str = "") -> Finding:
    return function(Rank(dist.get_rank(), dist.get_world_size(), folder=folder))


def with_kernels(function: Function) -> Finding:
    with synchronised_on_cpu():
        return on_ranks(function)


CASES: dict[str, tuple[Function, Function]] = {
    "exact": (exactness.exact, broken.exact),
    "largest-batch": (memory.largest_batch, broken.largest_batch),
    "out-of-memory": (memory.out_of_memory, memory.out_of_memory),
    "shards": (exactness.shards, broken.shards),
    "pipeline-float32": (pipeline.float32, broken.float32),
    "pipeline-bf16": (pipeline.bf16, pipeline.bf16),
}


@pytest.mark.parametrize("name", CASES)
def test_it_passes_and_finds_the_fault(ranks: RankPools, name: str, tmp_path: Path) -> None:
    function, faulty = CASES[name]
    for finding in ranks.run(2, on_ranks, function, str(tmp_path)):
        assert finding.outcome == "PASS", finding
    if faulty is not function:
        assert "FAIL" in [finding.outcome for finding in ranks.run(2, on_ranks, faulty, str(tmp_path))]


def test_three_ranks(ranks: RankPools, tmp_path: Path) -> None:
    for function in (exactness.exact, exactness.shards, pipeline.float32):
        for finding in ranks.run(3, on_ranks, function, str(tmp_path)):
            assert finding.outcome == "PASS", finding


def test_synchronised_batch_norm_with_kernels_for_the_processor(ranks: RankPools) -> None:
    for finding in ranks.run(2, with_kernels, exactness.synchronised_batch_norm, timeout_s=90):
        assert finding.outcome == "PASS", finding
    found = ranks.run(2, with_kernels, broken.synchronised_batch_norm, timeout_s=90)
    assert "FAIL" in [finding.outcome for finding in found]


def search_with_common_statistics() -> bool:
    with synchronised_on_cpu():
        return memory._refuses(Rank(dist.get_rank(), dist.get_world_size()))


def test_no_batch_is_searched_by_one_rank_where_all_normalise_it(ranks: RankPools) -> None:
    assert ranks.run(2, search_with_common_statistics) == [True, True]


def run_out_of_memory_in_hook(folder: str) -> tuple[str, int]:
    with mock.patch.object(base_strategy._log, "error") as error, pytest.raises(RankOutOfMemoryError) as caught:
        memory.out_of_memory_in_hook(Rank(0, 1, folder=folder))
    return str(caught.value), error.call_count


def test_a_hook_without_memory_is_named(ranks: RankPools, tmp_path: Path) -> None:
    ((message, errors),) = ranks.run(1, run_out_of_memory_in_hook, str(tmp_path))
    assert errors == 0, "it is not another rank that has failed"
    assert "Rank 0 (cpu) ran out of memory in the all-reduce" in message
    assert "what was communicated cannot be repeated" in message
    assert "32 samples in the hook pass" in message
    assert (tmp_path / "fault-0").exists()


# ---- devices that this machine lacks ---------------------------------------------------------------------------------


class Driver:
    """The answers of NVIDIA's driver to the questions about one device."""

    def __init__(self, total: int | None) -> None:
        self.total = total

    def total_bytes(self, uuid: str) -> int | None:
        return self.total if uuid == "GPU-1234" else None

    def driver_version(self) -> str:
        return "580.65.06"


def card(monkeypatch: pytest.MonkeyPatch, driver: Any, summed: Any = 8.0, uuid: str = "1234") -> Finding:
    def ones(*_: Any, **__: Any) -> Any:
        if isinstance(summed, Exception):
            raise summed
        return SimpleNamespace(sum=lambda: summed)

    properties = SimpleNamespace(name="Card", total_memory=16 * 2**30, major=7, minor=5, uuid=uuid)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch, "ones", ones)
    return environment.environment(Rank(0, 1), driver)


def test_a_card_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    found = card(monkeypatch, Driver(16 * 2**30 + 2**28))
    assert (found.outcome, found.figure) == ("PASS", 1.0)
    (device,) = found.details["devices"]
    assert (device["capability"], device["bf16"], device["uuid"]) == ("7.5", False, "GPU-1234")
    assert found.details["versions"]["driver"] == "580.65.06"
    json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("driver", "summed", "problem"),
    [
        (Driver(8 * 2**30), 8.0, "torch says 16.0 GiB, NVIDIA's driver 8.0 GiB of the same UUID"),
        (Driver(16 * 2**30), 7.0, "a sum on it is wrong"),
        (Driver(16 * 2**30), RuntimeError("CUDA error: no kernel image\nmore"), "CUDA error: no kernel image"),
    ],
)
def test_a_card_that_does_not(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, summed: float | Exception, problem: str
) -> None:
    found = card(monkeypatch, driver, summed)
    assert (found.outcome, found.figure, found.note) == ("FAIL", 0.0, f"cuda:0: {problem}")


def test_a_part_of_a_card_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = card(monkeypatch, Driver(16 * 2**30), uuid="other")
    assert (found.outcome, "driver does not answer" in found.note) == ("PASS", True)


@pytest.mark.parametrize(
    ("layout", "device"), [(Layout("cuda", (2,), ("A",)), "cuda:2"), (Layout("cuda", (0, 2), ("A", "B")), "cuda:2")]
)
def test_trainers_on_cards(layout: Layout, device: str) -> None:
    """Lightning finds three imitated cards; the ranks are nodes where they share one."""
    with ExitStack() as stack:
        for name, answer in {
            "lightning.fabric.accelerators.cuda.num_cuda_devices": 3,
            "lightning.pytorch.accelerators.cuda.num_cuda_devices": 3,
            "torch.cuda.is_available": True,
            "torch.cuda.get_device_capability": (7, 0),
            "torch.cuda.set_device": None,
        }.items():
            stack.enter_context(mock.patch(name, return_value=answer, create=True))
        stack.enter_context(mock.patch.dict(os.environ, layout.environment(1, 1234, os.environ), clear=True))
        settings = layout.of_rank(1)
        rank = Rank(**settings)
        for strategy in (rank.hetero(), rank.ddp(), rank.fsdp(), rank.pipeline()):
            trainer = rank.trainer(strategy)
            assert (str(strategy.root_device), str(rank.device)) == (device, device)
            assert (trainer.world_size, trainer.global_rank) == (2, 1)
            assert strategy.process_group_backend == layout.backend


class Event:
    """A mark on the timeline of an imitated device."""

    now_s = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_s = Event.now_s

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at_s - self.at_s)


def test_pauses_of_a_device_whose_clock_speeds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([0.5e9, 1e9, 1e9, 1.25e9])

    def sleep(cycles: int) -> None:
        Event.now_s += cycles / next(rates)

    monkeypatch.setattr(clocks, "sleep_on_device", sleep)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    pause = clocks.Pause(torch.device("cuda"))
    pause(0.5)
    pause(0.5)
    assert pause.seconds() == pytest.approx([0.5, 0.4]), "known is what was measured"


def test_memory_of_a_card_is_limited_to_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    for name, answer in {"synchronize": None, "empty_cache": None, "memory_reserved": 2**27}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**34))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    shortage = memory.Shortage(Rank(1, 2, "cuda", [0, 1]), "forward", 6)
    taken: list[int] = []
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: taken.append(size))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for step in range(1, 4):
        shortage.on_train_batch_end(SimpleNamespace(global_step=step))  # type: ignore[arg-type]
        shortage.allocate("forward", step)
        shortage.allocate("backward", 9)
    shortage.end()
    assert taken == [2 * 2**25, 3 * 2**25], "of the samples of a pass, once there is a limit"
    assert limits == [(2**27 + 6.5 * 2**25) / 2**34, 1.0]


class OfTwo(Rank):
    """The first of two ranks on cards; the other finds the half."""

    def gather(self, value: Any) -> list[Any]:
        return [value, value // 2]


@pytest.mark.parametrize(("of_stages", "outcome"), [(2**30, "PASS"), (3 * 2**30, "FAIL")])
def test_stages_on_cards_need_less_memory_than_the_model(
    monkeypatch: pytest.MonkeyPatch, of_stages: int, outcome: str
) -> None:
    held, trained = 2**28, iter([of_stages, of_stages, 2 * 2**30])
    for name in ("set_device", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held + next(trained))
    for function in ("_in_stages", "_on_one_device"):
        monkeypatch.setattr(pipeline, function, lambda *_: torch.ones(3))
    found = pipeline.float32(OfTwo(0, 2, "cuda", (0, 1)))
    assert found.outcome == outcome
    assert f"[{of_stages / 2**30}, {of_stages / 2**31}] (1f1b)" in found.note
    assert "one device 2.00 GiB" in found.note
    assert found.details["peaks"]["gpipe"] == [of_stages, of_stages // 2], "without what was held before"


# ---- as users run them -----------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_the_command_runs_a_check(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    assert main(["check", "--only", "exact", "--devices", "cpu", "--json", str(path)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert [(entry["check"], entry["outcome"]) for entry in found] == [("environment", "PASS"), ("exact", "PASS")]
    assert f"torch {torch.__version__}" in out
    assert 0 < found[1]["figure"] < found[1]["bound"]


@thorough
@pytest.mark.timeout(1800)
def test_all_that_can_run_on_the_processor_passes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    assert main(["check", "--devices", "cpu", "--json", str(path)]) == 0, capfd.readouterr().out
    found = {(e := json.loads(text))["check"]: e for text in path.read_text(encoding="utf-8").splitlines()}
    assert list(found) == [check.name for check in CHECKS]
    skips = {name for name, entry in found.items() if entry["outcome"] == "SKIP"}
    assert "sync-batch-norm" in skips
    assert skips <= {"sync-batch-norm", "balancer-cost", "equal-ranks", "own-time"}, "the latter on a busy machine"


@thorough
@pytest.mark.timeout(240)
def test_ranks_as_nodes_of_one_card() -> None:
    """What one card gets, on a processor: each rank is a node of one device."""
    result = run_check(named("exact"), Layout("cpu", (0,), ("none",)))
    assert result.finding.outcome == "PASS", result


def named(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


@thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [check.name for check in CHECKS if hasattr(broken, check.call.partition(":")[2])])
def test_each_check_fails_where_what_it_guards_is_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_PATIENCE_S", 5.0)
    check = named(name)
    if not check.why_not(CPU):
        result = run_check(replace(check, call=f"command.check.broken:{check.call.partition(':')[2]}"), CPU)
        if "too busy" in result.finding.note:
            pytest.skip(line(result))
        assert result.finding.outcome == "FAIL", line(result)


def test_every_check_has_a_fault() -> None:
    functions = {check.call.partition(":")[2] for check in CHECKS}
    assert {name for name in functions if not hasattr(broken, name)} == {"environment"}, "its faults are cards"
