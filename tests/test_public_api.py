"""What the package promises to whoever imports it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

import lightning_hetero
from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy
from lightning_hetero.exceptions import ConfigurationError


def run_python(code: str) -> str:
    """Run ``code`` in a new interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names_exist() -> None:
    for name in lightning_hetero.__all__:
        assert getattr(lightning_hetero, name)


def test_version_is_that_of_the_distribution() -> None:
    assert lightning_hetero.__version__ == importlib.metadata.version("lightning-hetero")


def test_types_are_shipped() -> None:
    assert Path(lightning_hetero.__file__).with_name("py.typed").exists()


def test_import_has_no_side_effects() -> None:
    """No CUDA, no NVML, no logging set up, and nothing heavy beside what lightning.pytorch imports anyway."""
    code = """
import logging, sys, warnings
import lightning.pytorch, torch
before = set(sys.modules)
loggers = {name: list(getattr(l, "handlers", [])) for name, l in logging.root.manager.loggerDict.items()}
handlers, filters = list(logging.root.handlers), list(warnings.filters)
import lightning_hetero
assert not torch.cuda.is_initialized()
assert getattr(sys.modules.get("pynvml"), "_nvmlLib_refcount", 0) == 0  # torch imports it, nobody starts it
assert logging.root.handlers == handlers and list(warnings.filters) == filters
for name, logger in logging.root.manager.loggerDict.items():
    assert list(getattr(logger, "handlers", [])) == loggers.get(name, []), name
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
    assert run_python(code) == "['lightning_hetero']"


FAMILY = sorted(name for name in StrategyRegistry if name == "ddp" or name.startswith("ddp_"))


def test_the_family_of_names_is_that_of_ddp() -> None:
    assert len(FAMILY) >= 12
    assert sorted(name for name in StrategyRegistry if name.startswith("hetero_ddp")) == [f"hetero_{n}" for n in FAMILY]


@pytest.mark.parametrize("name", FAMILY)
def test_a_name_means_what_it_means_for_ddp(name: str) -> None:
    ours, theirs = StrategyRegistry[f"hetero_{name}"], StrategyRegistry[name]
    assert ours["strategy"] is HeteroDDPStrategy
    assert ours["init_params"] == theirs["init_params"]
    assert StrategyRegistry.get(f"hetero_{name}")._start_method == theirs["init_params"]["start_method"]


def test_a_registered_name_carries_arguments() -> None:
    lightning_hetero.register("api_one_to_three", shares=[1, 3])
    lightning_hetero.register("api_spawned", "hetero_ddp_spawn_find_unused_parameters_true", batch_multiple=4)
    lightning_hetero.register("api_stages", "hetero_pipeline", splits=[2])
    try:
        one, spawned, stages = (StrategyRegistry.get(f"api_{n}") for n in ("one_to_three", "spawned", "stages"))
        assert (one.shares, one._start_method) == ([1, 3], "popen")
        assert (spawned.batch_multiple, spawned._start_method) == (4, "spawn")
        assert spawned._ddp_kwargs == {"find_unused_parameters": True}
        assert isinstance(stages, HeteroPipelineStrategy)
        assert stages.splits == [2]
        assert StrategyRegistry.get("api_one_to_three") is not one  # every Trainer gets its own
        trainer = Trainer(strategy="api_one_to_three", accelerator="cpu", devices=2, logger=False)
        assert isinstance(trainer.strategy, HeteroDDPStrategy)
        assert trainer.strategy.shares == [1, 3]
        lightning_hetero.register("api_one_to_three", shares=[2, 3])  # a notebook's cell runs again
        assert StrategyRegistry.get("api_one_to_three").shares == [2, 3]
    finally:
        for name in [name for name in StrategyRegistry if name.startswith("api_")]:
            StrategyRegistry.remove(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddp",), "`name` must be a new name, got 'ddp', which Trainers know already"),
        (("fsdp",), "`name` must be a new name"),
        (("hetero_ddp_spawn",), "`name` must be a new name"),
        (("hetero_pipeline",), "`name` must be a new name"),
        (("auto",), "`name` must be a new name"),
        (("Mine",), "`name` must be a name in lower case"),
        (("",), "`name` must be a name in lower case"),
        ((3,), "`name` must be a name in lower case"),
        (("mine", "ddp"), "`strategy` must be one of 'hetero_ddp', "),
        (("mine", ["hetero_ddp"]), "`strategy` must be one of 'hetero_ddp', "),
    ],
)
def test_a_name_that_cannot_be_registered_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    before = {name: dict(StrategyRegistry[name]) for name in StrategyRegistry}
    with pytest.raises(ConfigurationError, match=message):
        lightning_hetero.register(*arguments)
    assert {name: dict(StrategyRegistry[name]) for name in StrategyRegistry} == before


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        ("hetero_ddp", {"shares": [1, -3]}, r"`shares\[1\]` must be a finite positive number"),
        ("hetero_ddp", {"share": [1, 3]}, "Did you mean `shares`"),
        ("hetero_ddp", {"splits": [1]}, "`splits` must be an argument of HeteroDDPStrategy"),
        ("hetero_pipeline", {"shares": [1, 3]}, "`shares` must be an argument of HeteroPipelineStrategy"),
        ("hetero_pipeline", {"splits": [2, 1]}, "`splits` must be positive and strictly increasing"),
    ],
)
def test_arguments_are_checked_when_they_are_registered(strategy: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        lightning_hetero.register("mine", strategy, **arguments)
    assert "mine" not in StrategyRegistry


def test_the_package_shows_its_names() -> None:
    assert set(lightning_hetero.__all__) <= set(dir(lightning_hetero))
    with pytest.raises(AttributeError, match="has no attribute 'HeteroDDP'"):
        lightning_hetero.HeteroDDP  # noqa: B018


def test_a_package_that_is_run_as_a_module_gets_all_names(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("from lightning_hetero import LoadBalancer")
    (tmp_path / "training" / "__main__.py").write_text("from . import LoadBalancer\nprint(LoadBalancer.__name__)")
    done = subprocess.run(
        [sys.executable, "-m", "training"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "LoadBalancer", done.stderr
