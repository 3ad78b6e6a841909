"""What is installed is what the repository has, and it is what the tests import."""

from __future__ import annotations

import importlib.metadata
import os
import sysconfig
from pathlib import Path

import pytest

import lightning_hetero

SOURCE = Path(__file__).parents[1] / "lightning_hetero"

pytestmark = pytest.mark.skipif("TOX_ENV_NAME" not in os.environ, reason="tox installs the wheel, others may not")


def test_the_tests_import_the_installed_wheel() -> None:
    assert Path(lightning_hetero.__file__).is_relative_to(sysconfig.get_path("purelib"))


def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    installed = importlib.metadata.files("lightning-hetero") or []
    paths = {str(path) for path in installed if path.suffix != ".pyc"}
    package = {path for path in paths if path.startswith("lightning_hetero/")}
    source = {p for p in SOURCE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert package == {f"lightning_hetero/{path.relative_to(SOURCE).as_posix()}" for path in source}
    folders = {Path(path).parts[0] for path in paths - package}
    assert folders <= {"..", f"lightning_hetero-{lightning_hetero.__version__}.dist-info"}  # ".." leads to the command
    assert any(path.endswith("licenses/LICENSE") for path in paths)
    assert "lightning_hetero/py.typed" in package
