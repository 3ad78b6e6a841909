"""The package's shares and stages train more samples than those of published rules, on the same simulated devices."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str) -> Any:
    """Return a benchmark, or skip the test where there are none."""
    path = BENCHMARKS / f"{name}.py"
    if not path.exists():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # which dataclasses look up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", ["equal", "1:2", "1:2, much overhead", "1:2:4"])
def test_more_samples_at_first_and_after_a_change_and_never_fewer(case: str) -> None:
    module = benchmark("share_rules")
    for seed in range(3):
        own = module.ours(module.CASES[case], seed)
        for epoch in module.EPOCHS[:2]:
            for name, rule in module.RULES.items():
                found = module.trained(rule, module.CASES[case], epoch, seed)
                where = (name, epoch, seed, found, own)
                assert own.first_100 > found.first_100 or case == "equal", where
                assert own.after_change > found.after_change, where
                assert own.first_1000 >= found.first_1000 - (0.001 if case == "equal" else 0), where


@pytest.mark.parametrize("devices", ["1:1", "1:2", "1:2:4", "1:1:2", "1:4", "1:2:2:4"])
def test_stages_are_faster_than_those_that_ignore_the_devices(devices: str) -> None:
    module = benchmark("stage_rules")
    *rules, one_by_one, planned = module.fractions(module.DEVICES[devices]).values()
    assert max(rules) < one_by_one < planned <= 1
