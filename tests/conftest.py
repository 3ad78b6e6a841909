"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from differences import found
from harness import RankPools
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """Pools of real gloo ranks: ``ranks.run(world_size, function, *args)``."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def _no_leaked_environment() -> Iterator[None]:
    """Fail a test that leaves environment variables behind: Lightning's would change the tests after it."""
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--differences"):
        for comparison, difference in sorted(found.items()):
            terminalreporter.write_line(f"| {comparison} | {difference:.1e} |")
