"""Arrows between layers and between folders point one way, and files form no circles; each check is shown to fail."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import lightning_hetero

PACKAGE = Path(lightning_hetero.__file__).parent
# From the bottom up: a layer may import those before it.
LAYERS = ["exceptions", "balance", "hardware", "distributed", "plugin", "command"]
# What a layer must not import from outside, besides what its docstring says.
FOREIGN = {
    "exceptions": ["torch", "numpy", "lightning"],
    "balance": ["torch", "lightning", "os", "time", "socket", "pynvml"],
    "hardware": ["torch.distributed", "lightning"],
    "distributed": ["lightning", "pynvml"],
    "plugin": ["pytorch_lightning", "pynvml"],
    # the command stands beside the plugin and must not need Lightning
    "command": ["lightning", "pynvml", "lightning_hetero.distributed", "lightning_hetero.plugin"],
}
# Inside a layer: the folders that each folder may import. A layer's own files count as the folder "".
FOLDERS: dict[str, dict[str, set[str]]] = {
    "balance": {
        "": set(),
        "batch": {""},
        "record": {""},
        "shards": {""},
        "pipeline": {"", "batch", "tuning"},
        "tuning": {"", "batch", "record"},
    },
    "distributed": {
        "": set(),
        "group": {""},
        "data": {""},
        "pipeline": {"", "group"},
        "shards": {"", "group"},
    },
    "plugin": {
        "common": set(),
        "step": {"common"},
        "data": {"common", "step"},
        "balancing": {"common", "step"},
        "ddp": {"common", "step", "data", "balancing"},
        "fsdp": {"common", "step", "data", "balancing", "ddp"},
        "pipeline": {"common", "step"},
        "": {"ddp", "fsdp", "pipeline"},
    },
    "command": {
        "check": set(),
        "plan": set(),
        "probe": set(),
        "profile": {"plan"},
        "report": set(),
        "": {"check", "plan", "probe", "profile", "report"},
    },
}
# What `lightning-hetero check` and `profile` run. It trains, so it is above all layers; it is started by name.
CHILDREN = ("lightning_hetero.command.check.children", "lightning_hetero.command.profile.children")
MAX_LINES = 400
MAX_FILES = 14


def name_of(path: Path) -> str:
    """Return the dotted name of a module of the package."""
    parts = ("lightning_hetero", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    """Return the layer of a module; None for the public modules on top of all."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


def folder_of(module: str) -> str:
    """Return the folder of a module within its layer; "" for a file of the layer itself."""
    parts = module.split(".")
    return parts[2] if len(parts) > 3 or (len(parts) == 3 and parts[2] in FOLDERS.get(parts[1], {})) else ""


def imports_of(source: str) -> set[str]:
    """Return every module that ``source`` imports, inside functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [module for module in SOURCES if layer_of(module)]


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer_violations(module: str, source: str) -> set[str]:
    """Return the imports of ``source`` that its layer does not allow."""
    layer = layer_of(module)
    assert layer is not None
    higher = [f"lightning_hetero.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]]
    is_child = any(is_within(module, children) for children in CHILDREN)
    forbidden = ["pynvml"] if is_child else [*higher, *FOREIGN[layer], *CHILDREN]
    return {imported for imported in imports_of(source) for other in forbidden if is_within(imported, other)}


def folder_violations(module: str, source: str) -> set[str]:
    """Return the imports of ``source`` from folders of its own layer that its folder does not allow."""
    layer, folder = layer_of(module), folder_of(module)
    if layer not in FOLDERS:
        return set()
    allowed = FOLDERS[layer][folder] | {folder}
    within = [i for i in imports_of(source) if i in SOURCES and layer_of(i) == layer and i.count(".") > 1]
    return {imported for imported in within if folder_of(imported) not in allowed}


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Return one circle of imports per group of files that have any."""
    imports = {module: sorted(imports_of(source) & sources.keys()) for module, source in sources.items()}
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for imported in imports[module]:
                visit(imported, [*path, module])
            done.add(module)

    for module in imports:
        visit(module, [])
    return found


def too_long(sources: Mapping[str, str]) -> list[str]:
    return [module for module, source in sources.items() if source.count("\n") > MAX_LINES]


def crowded(files: Iterable[Path]) -> list[str]:
    folders = [path.parent for path in files]
    return sorted({str(folder) for folder in folders if folders.count(folder) > MAX_FILES})


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert layer_violations(module, SOURCES[module]) == set()
    assert folder_violations(module, SOURCES[module]) == set()


def test_files_form_no_circles() -> None:
    # the package's own file imports the plugin, and what it exports is asked for by its name
    assert circles({module: source for module, source in SOURCES.items() if module != "lightning_hetero"}) == []


def test_folders_form_no_circles() -> None:
    for folders in FOLDERS.values():
        order = {f"lightning_hetero.{name or 'own'}": name for name in folders}
        names = {name: module for module, name in order.items()}
        sources = {module: "\n".join(f"import {names[i]}" for i in folders[name]) for module, name in order.items()}
        assert circles(sources) == []


def test_every_folder_is_a_layer_or_a_room() -> None:
    def folders(root: Path) -> set[str]:
        return {path.name for path in root.iterdir() if path.is_dir() and path.name != "__pycache__"}

    assert folders(PACKAGE) == set(LAYERS[1:])
    for layer in LAYERS[1:]:
        assert folders(PACKAGE / layer) == set(FOLDERS.get(layer, {})) - {""}


def test_files_are_short_and_folders_are_not_crowded() -> None:
    assert too_long(SOURCES) == []
    assert crowded(path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts) == []


# ---- the checks can fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("balance.types", "import torch"),
        ("balance.types", "def f():\n    from torch import nn"),
        ("balance.batch.caps", "from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy"),
        ("balance.types", "from lightning_hetero import plugin"),
        ("hardware.probe", "from torch import distributed"),
        ("hardware.probe", "import torch.distributed as dist"),
        ("distributed.collectives", "from lightning.pytorch import Trainer"),
        ("exceptions", "from lightning_hetero.balance.types import BatchPlan"),
        ("command.main", "from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy"),
        ("command.check.runner", "from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy"),
        ("command.check.runner", "def f():\n    from lightning_hetero.command.check.children.rank import Rank"),
        ("command.check.children.memory", "import pynvml"),
        ("plugin.registry", "from lightning_hetero.command.main import main"),
    ],
)
def test_an_arrow_between_layers_that_is_turned_round_is_found(module: str, source: str) -> None:
    assert layer_violations(f"lightning_hetero.{module}", source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("balance.batch.caps", "from lightning_hetero.balance.tuning.window import summarise"),
        ("balance.types", "from lightning_hetero.balance.batch.caps import halved"),
        ("plugin.common.console", "from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy"),
        (
            "plugin.balancing.load_balancer",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lightning_hetero.plugin.ddp.strategy",
        ),
        ("plugin.pipeline.step", "from lightning_hetero.plugin.ddp.stand_in import stand_in"),
        ("command.plan.command", "from lightning_hetero.command.report.page import build"),
    ],
)
def test_an_arrow_between_folders_that_is_turned_round_is_found(module: str, source: str) -> None:
    assert folder_violations(f"lightning_hetero.{module}", source)


def test_a_circle_is_found_also_under_type_checking() -> None:
    low, high = "lightning_hetero.plugin.common.protocols", "lightning_hetero.plugin.ddp.strategy"
    turned = f"{SOURCES[low]}\nif TYPE_CHECKING:\n    from {high} import HeteroDDPStrategy\n"
    assert circles({**SOURCES, low: turned})


def test_long_files_and_crowded_folders_are_found() -> None:
    assert too_long({"long": "\n" * (MAX_LINES + 1)}) == ["long"]
    assert crowded(Path(f"folder/{i}.py") for i in range(MAX_FILES + 1)) == ["folder"]


def test_the_checks_let_pass_what_is_allowed() -> None:
    module = "lightning_hetero.hardware.probe"
    assert not layer_violations(module, "import torch\nfrom lightning_hetero.balance.types import DeviceProfile")
    module = "lightning_hetero.plugin.ddp.strategy"
    assert not layer_violations(module, "import lightning_hetero.distributed.collectives")
    assert not folder_violations(module, "import lightning_hetero.plugin.balancing.load_balancer")
    module = "lightning_hetero.command.check.children.memory"
    assert not layer_violations(module, "import lightning.pytorch, lightning_hetero.plugin.ddp.strategy")
