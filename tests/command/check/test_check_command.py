"""``lightning-hetero check``: what it promises before it runs, and that no process outlives it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults.launch import all_ended

from lightning_hetero.command.check import command, runner
from lightning_hetero.command.check.catalogue import CHECKS, ENVIRONMENT, Check, named
from lightning_hetero.command.check.ended import Ended, judge_failure
from lightning_hetero.command.check.finding import Finding, at_most, failed, measured_at_most, skipped
from lightning_hetero.command.check.layout import CPU, Layout, layout_of, parse_devices
from lightning_hetero.command.check.runner import Result, run_check
from lightning_hetero.command.check.summary import json_line, line, summary
from lightning_hetero.command.main import main
from lightning_hetero.exceptions import ConfigurationError

TESTS = Path(__file__).parents[2]
START = "import sys; sys.argv[0] = 'lightning-hetero'"
# which what a shell runs in the background does not
HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
RUN = "from lightning_hetero.command.main import main\nsys.exit(main())"


def pretended(name: str, **how: Any) -> Check:
    """Return a check that calls a function of ``pretended.py``."""
    return Check(name, "", f"command.check.pretended:{name}", **how)


@pytest.fixture(autouse=True)
def _found_by_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))


# ---- without running anything ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--list", "--help"])
def test_neither_torch_nor_lightning_is_needed_for_the_list(option: str) -> None:
    before = f"{START}; sys.modules['torch'] = sys.modules['lightning'] = sys.modules['psutil'] = None"
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{RUN}", "check", option],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--limit-s" in done.stdout or [line.split()[0] for line in done.stdout.splitlines()] == [
        check.name for check in CHECKS
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "exact", "exat"], "`--only` must be names of checks, got 'exat'"),
        (["--limit-s", "0"], "`--limit-s` must be a positive number of seconds, got '0'"),
        (["--limit-s", "nan"], "got 'nan'"),
        (["--limit-s", "2 min"], "got '2 min'"),
        (["--devices", "0,0"], "`--devices` must be `cpu` or different numbers of CUDA devices"),
        (["--devices", "cuda"], "got 'cuda'"),
        (["--json", "/no/folder/x"], "`--json` must be a file that can be written, got '/no/folder/x'"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *options]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_devices_are_chosen() -> None:
    assert layout_of(None, []) == CPU
    assert layout_of((), ["A", "B"]) == CPU
    one = layout_of(None, ["A"])
    assert (one.devices, one.ranks, one.backend, one.shared) == ((0,), 2, "gloo", True)
    two = layout_of(None, ["A", "A", "A"])
    assert (two.devices, two.ranks, two.backend, two.shared) == ((0, 1), 2, "nccl", False)
    assert layout_of(None, ["A", "A", "B"]).devices == (0, 2), "different models"
    assert layout_of(None, ["A", "A", "B"], [0]).devices == (1, 2)
    assert layout_of(None, ["A", "B"], [0]).devices == (1,)
    assert layout_of(None, ["A"], [0]) == CPU
    assert layout_of((2, 0, 1), ["A", "A", "B"]).names == ("B", "A", "A")
    with pytest.raises(ConfigurationError, match=r"that torch finds \(1\), got 1\."):
        layout_of((0, 1), ["A"])
    assert parse_devices("cpu") == ()
    assert parse_devices("3,1") == (3, 1)


def test_ranks_on_one_card_are_nodes_and_others_are_not() -> None:
    variables = {"SLURM_NTASKS": "4", "TORCHELASTIC_RUN_ID": "x", "RANK": "3", "HOME": "/h", "OMP_NUM_THREADS": "2"}
    shared, apart = (Layout("cuda", devices, ("A",) * len(devices)) for devices in ((0,), (0, 1)))
    for layout, places in ((shared, ("1", "0")), (apart, ("0", "1")), (CPU, ("0", "1"))):
        found = layout.environment(1, 1234, variables)
        assert (found["NODE_RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (*places, "2")
        nccl = {"NCCL_HOSTID", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_MAX_NCHANNELS"}
        assert {*found} - (nccl if layout is shared else set()) == {
            *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "HOME", "OMP_NUM_THREADS")
        }
        assert found["OMP_NUM_THREADS"] == "2"
    assert shared.environment(0, 1234, {})["NCCL_HOSTID"] != shared.environment(1, 1234, {})["NCCL_HOSTID"]
    assert [layout.of_rank(0, nccl=True)["backend"] for layout in (shared, apart, CPU)] == ["nccl", "nccl", "gloo"]
    assert [layout.of_rank(0)["backend"] for layout in (shared, apart, CPU)] == ["gloo", "nccl", "gloo"]


def test_what_cannot_run_says_why() -> None:
    card = Layout("cuda", (0,), ("A",))
    reasons = {check.name: (check.why_not(CPU), check.why_not(card)) for check in CHECKS}
    assert reasons["exact"] == ("", "")
    assert reasons["sync-batch-norm"] == ("needs a CUDA device", "")
    assert reasons["best-shares"] == ("", "needs two CUDA devices, got one")
    assert reasons["pipeline-bf16"] == ("", "")
    assert not any(check.why_not(Layout("cuda", (0, 1), ("A", "B"))) for check in CHECKS)
    (check,) = named(["sync-batch-norm"])
    assert run_check(check, CPU) == Result(check, skipped("needs a CUDA device"))


def test_checks_have_names_of_their_own_and_come_in_order() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert [check.name for check in named(["kill", "exact"])] == ["exact", "kill"]
    assert named([]) == CHECKS


# ---- failures on purpose ---------------------------------------------------------------------------------------------


def ended(text: str, status: int | None = 1, ended_s: float | None = 110.0, fault_s: float | None = 100.0) -> Finding:
    peer = Ended(0, status, ended_s, text)
    return judge_failure([peer, Ended(1, -9, 101.0, "", fault_s=fault_s)])


@pytest.mark.parametrize(
    "text",
    [
        "x\nRankFailedError: Another rank has failed: rank 1 with\nTraceback",
        "RankFailedError: rank 1 does not answer (it is stopped, gone, ...)",
        "Rank 1 (cuda:0) ran out of memory in a communication hook",
    ],
)
def test_peers_that_name_the_rank_in_time_pass(text: str) -> None:
    finding = ended(text)
    assert (finding.outcome, finding.figure, finding.bound) == ("PASS", 10.0, 30.0)


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (ended("rank 10 does not answer; LOCAL_RANK: 1 failed"), "does not name rank 1"),
        (ended("RuntimeError: Connection closed by peer"), "the output of rank 0 does not name rank 1"),
        (ended("rank 1 does not answer", status=0), "rank 0 ended as if nothing had happened"),
        (ended("rank 1 does not answer", fault_s=None), "rank 1 did not come to the step"),
        (ended("rank 1 does not answer", ended_s=131.0), "until all had ended"),
    ],
)
def test_peers_that_do_not_fail(finding: Finding, words: str) -> None:
    assert finding.outcome == "FAIL"
    assert words in finding.note


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_rank_that_hangs_is_a_failure_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    token = uuid.uuid4().hex
    monkeypatch.setenv("LIGHTNING_HETERO_TEST_RUN", token)
    with all_ended(token):
        result = run_check(pretended("hangs"), CPU, 4.0)
        assert result.finding.outcome == "FAIL"
        assert result.finding.note == "rank 0, 1 had not ended after 4 s"
        assert "waiting\n" in result.output
        assert 'pretended.py", line' in result.output, "a traceback says where"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "outcome", "figure", "note"),
    [
        ("passes", "PASS", 0.2, "a length"),
        ("one_fails", "FAIL", 5.0, "of rank 1"),
        ("one_is_skipped", "SKIP", None, "too old"),
        ("all_raise", "FAIL", None, "OSError: a first line"),
        ("ends", "FAIL", None, "rank 0 ended with exit status 3"),
        ("leaves_a_process", "PASS", 0.2, "a length"),
        ("missing", "FAIL", None, "AttributeError: module 'command.check.pretended' has no attribute 'missing'"),
    ],
)
def test_the_worst_rank_decides(
    name: str, outcome: str, figure: float | None, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_PATIENCE_S", 1.0)
    token = uuid.uuid4().hex
    monkeypatch.setenv("LIGHTNING_HETERO_TEST_RUN", token)
    with all_ended(token):
        found = run_check(pretended(name), CPU).finding
    assert (found.outcome, found.figure and round(found.figure, 3), found.note) == (outcome, figure, note)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interruption_leaves_nothing_behind(sent: signal.Signals, status: int) -> None:
    token = uuid.uuid4().hex
    with all_ended(token):
        process = subprocess.Popen(
            [sys.executable, "-c", f"{START}\n{HEARS_CTRL_C}\n{RUN}", "check", "--only", "exact"],
            env={**os.environ, "LIGHTNING_HETERO_TEST_RUN": token},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while "exact" not in arguments_of_children(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (status, "")


def arguments_of_children(pid: int) -> str:
    """Return the arguments of a process's children; imports start some too, before there is anything to leave."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    found = ""
    for child in children:
        with suppress(OSError):
            arguments = Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8", errors="replace")
            found += arguments if "parent" in arguments else ""
    return found


# ---- what it prints --------------------------------------------------------------------------------------------------

DETAILS = {
    "versions": {"lightning_hetero": "0.1.0", "torch": "2.13.0"},
    "devices": [
        {
            "number": 0,
            "name": "Old Card",
            "capability": "7.0",
            "memory_bytes": 16 * 2**30,
            "bf16": False,
            "problem": "",
            "note": "x",
        }
    ],
}


def pretend(monkeypatch: pytest.MonkeyPatch, **outcomes: Finding) -> list[tuple[str, Layout]]:
    """Let checks find what is given, and everything else pass; return which are run where."""
    runs = []

    def run(check: Check, layout: Layout, limit_s: float | None = None) -> Result:
        runs.append((check.name, layout))
        if check == ENVIRONMENT:
            return Result(check, Finding("PASS", 1.0, "devices", details=DETAILS), 1.0)
        finding = outcomes.get(check.name, at_most(3.0, 1.5, "%", "a | note"))
        return Result(check, finding, 2.0, "rank 1:\nlast words" if finding.outcome == "FAIL" else "")

    monkeypatch.setattr(runner, "run_check", run)
    return runs


def test_it_reports_line_by_line_and_in_a_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = pretend(monkeypatch, exact=failed("it differs"), kill=skipped("needs two CUDA devices, got one"))
    path = tmp_path / "found.jsonl"
    assert main(["check", "--only", "exact", "own-time", "kill", "--json", str(path)]) == 1
    assert [name for name, _ in runs] == ["environment", "exact", "own-time", "kill"]
    assert {layout.title for _, layout in runs[1:]} == {"2 ranks on cuda:0 (Old Card) over gloo"}
    out = capsys.readouterr().out
    for words in (
        "FAIL  exact               it differs  [2 s]",
        "PASS  own-time            1.5 % (at most 3), a | note  [2 s]",
        "SKIP  kill                needs two CUDA devices, got one  [2 s]",
        "lightning-hetero check: 2 passed, 1 failed, 1 skipped, 7 s",
        "lightning_hetero 0.1.0, torch 2.13.0",
        "- cuda:0 Old Card, capability 7.0, 16.0 GiB, bf16 is emulated, x",
        "| own-time | PASS | 1.5 % (at most 3) | a / note |",
        "exact:\n\n```text\nrank 1:\nlast words\n```",
    ):
        assert words in out
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert [entry["check"] for entry in lines] == ["environment", "exact", "own-time", "kill"]
    assert lines[1] == {
        **{"check": "exact", "outcome": "FAIL", "figure": None, "unit": "", "bound": None, "note": "it differs"},
        **{"details": {}, "seconds": 2.0, "output": "rank 1:\nlast words"},
    }


def test_it_succeeds_if_nothing_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs = pretend(monkeypatch, kill=skipped("x"))
    assert main(["check", "--devices", "cpu"]) == 0
    assert [name for name, _ in runs] == [check.name for check in CHECKS]
    assert runs[-1][1] == CPU
    capsys.readouterr()
    assert main(["check", "--devices", "1"]) == 2
    assert "that torch finds (1), got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figure", "error", "outcome"),
    [(1.0, 9.0, "PASS"), (1.2, 0.05, "FAIL"), (1.2, 0.1, "SKIP"), (9.0, 0.1, "FAIL"), (float("nan"), 0.1, "FAIL")],
)
def test_what_cannot_be_told_is_skipped(figure: float, error: float, outcome: str) -> None:
    finding = measured_at_most(1.0, figure, error, "x", "", ratios=[1.0])
    assert (finding.outcome, finding.details["error"], finding.details["ratios"]) == (outcome, error, [1.0])


def test_a_figure_that_is_not_a_number_fails() -> None:
    assert at_most(1.0, float("nan"), "", "").outcome == "FAIL"
    result = Result(replace(ENVIRONMENT, name="x"), at_most(1.0, float("nan"), "s", "y"))
    assert line(result).startswith("FAIL  x ")
    assert Finding.from_dict(result.finding.to_dict()).note == "y"
    assert json.loads(json_line(result))["check"] == "x"
    assert json.loads(json_line(result))["figure"] is None, "JSON has no NaN"
    assert "0 passed, 1 failed" in summary([result], CPU, {})


def test_its_help_names_every_option() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for option in ("--list", "--only", "--devices", "--limit-s", "--json"):
        assert option in parser.format_help()
