"""Fixtures that every test may use, and how tests share the workers of ``pytest -n 3 --dist loadgroup``."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import harness
import one_card
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
}

# A worker's lock of all others, kept from one test that measures times to the next.
_KEPT = pytest.StashKey[ExitStack | None]()


def _is_timed(item: pytest.Item) -> bool:
    if one_card.is_wanted():  # nothing keeps its time there
        return False
    return item.path.name in TIMED or getattr(item, "originalname", "") in TIMED_TESTS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep on one worker what measures times, and the tests of a file that uses ranks, for its pools."""
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        if _is_timed(item):  # the largest group, with which xdist begins: no other test has to be waited for
            item.add_marker(pytest.mark.xdist_group("timed"))
        elif "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


# the first, so that waiting counts towards no test's time-out
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Run nothing beside a test that measures times."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    kept = item.session.stash
    with kept.get(_KEPT, None) or _turn(_is_timed(item)) as turn:
        result = yield
        more = _is_timed(item) and nextitem is not None and _is_timed(nextitem)
        kept[_KEPT] = turn.pop_all() if more else None
    return result


def _turn(alone: bool) -> ExitStack:
    with ExitStack() as turn:
        with _locked(Path(harness.__file__), fcntl.LOCK_EX):  # so that whoever waits for all others comes to its turn
            turn.enter_context(_locked(Path(__file__), fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return turn.pop_all()


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open() as file:  # any file that all workers know
        fcntl.flock(file, how)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a process that the test has left may have inherited it


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
