"""The helpers of the tests fail when they should, and leave no process running."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import TIMED
from harness import RankError, RankPool
from scripts import run_script, running_in_session
from training import assert_close

NUMBERS = [0.5, -2.0, 1e6]


@pytest.mark.parametrize(
    "other",
    [[0.5, -2.0, 1e6 + 1e-9], [0.5, -2.0, math.nan], [0.5, -2.0, math.inf], [0.5, -2.0], [*NUMBERS, 0.0]],
    ids=["rounding", "nan", "infinite", "too few", "too many"],
)
def test_numbers_that_differ_are_not_close(other: list[float]) -> None:
    assert_close(NUMBERS, NUMBERS)
    for pair in ((NUMBERS, other), (other, NUMBERS)):
        with pytest.raises(AssertionError):
            assert_close(*pair)


def test_the_largest_difference_decides() -> None:
    assert_close(NUMBERS, [0.5, -2.0, 1e6 + 0.25], tolerance=0.5)
    with pytest.raises(AssertionError, match=r"the largest difference is 0\.75"):
        assert_close(NUMBERS, [0.5, -2.75, 1e6 + 0.25], tolerance=0.5)


@pytest.mark.xdist_group("harness")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="nothing is distributed")
def test_what_measures_times_stays_on_one_worker(request: pytest.FixtureRequest) -> None:
    """With pytest 9.2, xdist 3.8 distributes the tests of a group without a word."""
    timed = {item.nodeid for item in request.session.items if item.path.name in TIMED}
    assert all(nodeid.endswith("@timed") for nodeid in timed)
    assert request.node.nodeid.endswith("@harness")


def wait_on_rank_one() -> int:
    if dist.get_rank() == 1:
        time.sleep(60)
    return os.getpid()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("raised by a test")


def is_running(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_a_rank_that_hangs_ends_with_its_pool() -> None:
    pool = RankPool(2)
    processes = pool.run(os.getpid)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not finish wait_on_rank_one"):
        pool.run(wait_on_rank_one, timeout_s=5.0)
    pool.close(patience_s=0.5)
    assert not any(map(is_running, processes))


def test_a_rank_that_fails_is_named() -> None:
    pool = RankPool(2)
    with pytest.raises(RankError, match=r"(?s)^rank 1:.*ValueError: raised by a test"):
        pool.run(fail_on_rank_one)
    pool.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [("import time; time.sleep(60)", "hangs"), ("import os; os.spawnlp(os.P_NOWAIT, 'sleep', 'sleep', '60')", "left")],
)
def test_a_script_that_does_not_end_is_ended(tmp_path: Path, code: str, message: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os\nprint(os.getpid(), flush=True)\n{code}\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=message) as caught:
        run_script(script, timeout_s=2.0 if message == "hangs" else 60.0, patience_s=0.5)
    (session,) = re.findall(r"^\d+$", str(caught.value), re.MULTILINE)
    assert not running_in_session(int(session))


def test_what_a_script_prints_and_how_it_ends_is_returned(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit('an error')\n", encoding="utf-8")
    done = run_script(script, "a", "b c")
    assert (done.returncode, done.stdout, done.stderr) == (1, "['a', 'b c']\n", "an error\n")
