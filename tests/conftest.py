"""Fixtures that every test may use, and how tests share the workers of ``pytest -n 3 --dist loadgroup``."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from differences import found, measured
from harness import RankPools
from hypothesis import settings
from profiles import THOROUGH

settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1_000)
settings.load_profile("thorough" if THOROUGH else "default")

# Their ranks sleep or compute for known times, and what they then measure decides what they do: nothing else may run.
TIMED = {
    "test_communication.py",
    "test_device_waits.py",
    "test_load_balancer.py",
    "test_memory.py",
    "test_pipeline_planning.py",
    "test_poison.py",
    "test_reporter.py",
    "test_step_timer.py",
}

# The same of single tests: checks that measure, a stall that has to end before a time-out, and a rank that has to save
# before torchrun ends it, a moment after another rank has failed.
TIMED_TESTS = {
    "test_all_that_can_run_on_the_processor_passes",
    "test_a_training_survives_a_stall_shorter_than_the_time_out",
    "test_a_rank_that_fails_saves_where_it_was",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of a file that uses ranks on one worker, for its pools and for what its tests compare with."""
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(autouse=True)
def _undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run nothing beside a test that measures times."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    folder = tmp_path_factory.getbasetemp().parent  # of all workers
    with ExitStack() as stack:
        with _locked(folder / "next", fcntl.LOCK_EX):  # so that whoever waits for all others comes to its turn
            timed = request.path.name in TIMED or request.node.name in TIMED_TESTS
            stack.enter_context(_locked(folder / "running", fcntl.LOCK_EX if timed else fcntl.LOCK_SH))
        yield


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """Pools of real gloo ranks: ``ranks.run(world_size, function, *args)``."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def _no_leaked_environment() -> Iterator[None]:
    """Fail a test that leaves environment variables changed: Lightning's would change the tests after it."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    ignored = {"PYTEST_CURRENT_TEST"}
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} - ignored
    assert not changed, f"environment variables left changed: {sorted(changed)}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--differences", action="store_true", help="print the largest difference of each comparison")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["differences"] = found


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for comparison, difference in getattr(node, "workeroutput", {}).get("differences", {}).items():
        measured(comparison, difference)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--differences"):
        for comparison, difference in sorted(found.items()):
            terminalreporter.write_line(f"| {comparison} | {difference:.1e} |")
