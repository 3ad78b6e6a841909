"""Arrows between the layers point down only; the check itself is shown to fail."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_hetero

PACKAGE = Path(lightning_hetero.__file__).parent
# from the bottom up: a layer may import those before it
LAYERS = ["exceptions", "balance", "hardware", "distributed", "plugin", "command"]
# what a layer must not import from outside, beside what its docstring says
FOREIGN = {
    "exceptions": ["torch", "numpy", "lightning"],
    "balance": ["torch", "lightning", "os", "time", "socket", "pynvml"],
    "hardware": ["torch.distributed", "lightning"],
    "distributed": ["lightning", "pynvml"],
    "plugin": ["pytorch_lightning", "pynvml"],
    # the command stands beside the plugin and must not need Lightning
    "command": ["lightning", "pynvml", "lightning_hetero.distributed", "lightning_hetero.plugin"],
}


def layer_of(path: Path) -> str | None:
    """Return the layer of a file; None for the public modules on top of all."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return first if first in LAYERS else None


def imports_of(source: str) -> set[str]:
    """Return every module that ``source`` imports, those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(layer: str, source: str) -> set[str]:
    """Return the imports of ``source`` that its layer does not allow."""
    higher = [f"lightning_hetero.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]]
    return {
        module
        for module in imports_of(source)
        for forbidden in higher + FOREIGN[layer]
        if module == forbidden or module.startswith(f"{forbidden}.")
    }


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if layer_of(path)]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    assert layer is not None
    assert violations(layer, path.read_text(encoding="utf-8")) == set()


def test_every_folder_is_a_layer() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(LAYERS[1:])


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("balance", "import torch"),
        ("balance", "def f():\n    from torch import nn"),
        ("balance", "from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy"),
        ("balance", "from lightning_hetero import plugin"),
        ("hardware", "from torch import distributed"),
        ("hardware", "import torch.distributed as dist"),
        ("distributed", "from lightning.pytorch import Trainer"),
        ("exceptions", "from lightning_hetero.balance.types import BatchPlan"),
        ("command", "from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy"),
        ("plugin", "from lightning_hetero.command.main import main"),
    ],
)
def test_the_check_can_fail(layer: str, source: str) -> None:
    assert violations(layer, source)


def test_the_check_lets_pass_what_is_allowed() -> None:
    assert not violations("hardware", "import torch\nfrom lightning_hetero.balance.types import DeviceProfile")
    assert not violations("distributed", "import torch.distributed as dist\nimport lightning_hetero.hardware.probe")
