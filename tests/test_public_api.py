"""What the package promises to whoever imports it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.strategies import StrategyRegistry

import lightning_hetero
from lightning_hetero import HeteroDDPStrategy


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


IMPORTS = ["import pytorch_lightning as pl", "import lightning_hetero"]


@pytest.mark.parametrize("imports", [IMPORTS, IMPORTS[::-1]], ids=["before", "after"])
def test_the_other_lightning_package_answers_clearly(imports: list[str]) -> None:
    code = """
try:
    pl.Trainer(strategy="hetero_ddp", accelerator="cpu", devices=2)
except lightning_hetero.exceptions.UnsupportedFeatureError as error:
    print(error)
"""
    printed = run_python("\n".join(["import warnings; warnings.filterwarnings('ignore')", *imports, code]))
    assert "Replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl`" in printed


def test_a_package_that_is_run_as_a_module_gets_all_names(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("from lightning_hetero import LoadBalancer")
    (tmp_path / "training" / "__main__.py").write_text("from . import LoadBalancer\nprint(LoadBalancer.__name__)")
    done = subprocess.run(
        [sys.executable, "-m", "training"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "LoadBalancer", done.stderr
