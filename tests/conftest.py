"""Fixtures that every test may use, and how tests share the workers of ``pytest -n 3 --dist loadgroup``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import one_card
import psutil
import pytest
from differences import found, measured
from harness import RankPools
from hypothesis import settings
from profiles import THOROUGH

settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1_000)
settings.load_profile("thorough" if THOROUGH else "default")

# Their ranks sleep or compute for known times, and what they then measure decides what they do: all others give way.
TIMED = {
    "test_balancers_of_runs.py",
    "test_communication.py",
    "test_device_waits.py",
    "test_layers_that_communicate.py",
    "test_load_balancer.py",
    "test_memory.py",
    "test_pipeline_drift.py",
    "test_pipeline_orders.py",
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
    "test_equal_stages_and_those_found_train_alike",
    "test_waiting_for_parameters_is_not_own_time_and_plans_fit_beside_shards",
}

# Their tests take long one by one, so that they come before the short ones, which fill the workers up to the end.
LONG = {
    "test_checks.py",
    "test_crash.py",
    "test_errors.py",
    "test_examples.py",
    "test_launchers.py",
    "test_nodes.py",
    "test_replica_faults.py",
    "test_stall.py",
}

# Linux never lets a process of this niceness delay one of the ordinary for long.
_GIVES_WAY = 19


def _is_timed(item: pytest.Item) -> bool:
    if one_card.is_wanted():  # nothing keeps its time there
        return False
    return item.path.name in TIMED or getattr(item, "originalname", "") in TIMED_TESTS


# before xdist's own, which reads the marks
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep on one worker what measures times, and the tests of a file that uses ranks, for its pools."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if _is_timed(item):  # the largest group, with which xdist begins
            item.add_marker(pytest.mark.xdist_group("timed"))
        elif "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give way to tests that measure times, which mostly sleep: run at the lowest priority from the first other one."""
    if "PYTEST_XDIST_WORKER" in os.environ and not _is_timed(item) and os.nice(0) < _GIVES_WAY:
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):  # pools of ranks that timed tests have left
            with suppress(psutil.NoSuchProcess):
                process.nice(_GIVES_WAY)


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


@pytest.fixture(autouse=True)
def _same_rank() -> Iterator[None]:
    """Undo what a strategy of another rank leaves in this process: only rank 0 would warn in the tests after it."""
    yield
    rank_zero: Any = sys.modules.get("lightning_utilities.core.rank_zero")
    if rank_zero is not None and getattr(rank_zero.rank_zero_only, "rank", 0) != 0:
        rank_zero.rank_zero_only.rank = 0


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
