"""What is installed is what the repository has, it is what the tests import, and its files agree on versions."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_hetero

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "lightning_hetero"

# `coverage run` puts the clone before the wheel
needs_wheel = pytest.mark.skipif(
    os.environ.get("TOX_ENV_NAME", "coverage") == "coverage", reason="tox installs the wheel, others may not"
)


@needs_wheel
def test_the_tests_import_the_installed_wheel() -> None:
    assert Path(lightning_hetero.__file__).is_relative_to(sysconfig.get_path("purelib"))


@needs_wheel
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


def project_file() -> Any:
    """Return what pyproject.toml says."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def only_version(requirement: Requirement, operator: str) -> Version:
    """Return the version of the one specifier with this operator."""
    (version,) = [Version(s.version) for s in requirement.specifier if s.operator == operator]
    return version


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    content = project_file()
    project = content["project"]
    declared = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        content["dependency-groups"]["test"],
    ]
    required = [Requirement(text) for texts in declared for text in texts]
    bounds = {
        (canonicalize_name(r.name), only_version(r, ">=")) for r in required if r.name != project["name"]
    }  # a name with two bounds is there twice, and so equals no constraint
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    assert bounds == {(canonicalize_name(r.name), only_version(r, "==")) for r in pinned}


def test_the_versions_of_the_libraries_are_pinned() -> None:
    lines = (ROOT / "constraints-libraries.txt").read_text(encoding="utf-8").splitlines()
    required = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(requirement.name): only_version(requirement, "==") for requirement in required}
    assert {canonicalize_name(name) for name in project_file()["dependency-groups"]["libraries"]} <= set(pinned)
    (torch,) = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned[canonicalize_name("torch")] == Version(torch)


def test_the_page_on_libraries_names_the_versions_that_are_tested() -> None:
    constraints = (ROOT / "constraints-libraries.txt").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "how_to" / "libraries.md").read_text(encoding="utf-8")
    named: dict[str, str] = {
        canonicalize_name(name.replace("PyTorch", "torch").replace(" ", "-")): version
        for name, version in re.findall(r"^\| \[([\w -]+)\]\(#[\w-]+\) ([\d.]+) ", page, re.MULTILINE)
    }
    installed = {canonicalize_name(name) for name in project_file()["dependency-groups"]["libraries"]}
    assert set(named) == installed - {"peft"}  # which changes models, and trains none
    for name, version in named.items():
        assert re.search(rf"^{name}=={re.escape(version)}\.", constraints, re.MULTILINE), name


def test_both_packages_of_lightning_have_the_same_versions() -> None:
    content = project_file()
    declared = [Requirement(r) for r in (*content["project"]["dependencies"], *content["dependency-groups"]["test"])]
    one, other = ([r for r in declared if r.name == name] for name in ("lightning", "pytorch-lightning"))
    assert [r.specifier for r in one] == [r.specifier for r in other]
    installed = [importlib.metadata.version(name) for name in ("lightning", "pytorch-lightning")]
    assert installed[0] == installed[1]


def test_every_declared_python_has_a_test_environment() -> None:
    prefix = "Programming Language :: Python :: 3."
    declared = [c.removeprefix(prefix) for c in project_file()["project"]["classifiers"] if c.startswith(prefix)]
    environments = re.search(r"^\[testenv:py3\{([\d,]+)\}-tests\]$", (ROOT / "tox.ini").read_text(), re.MULTILINE)
    assert environments is not None
    assert declared == environments[1].split(",")


def test_a_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lightning_hetero.__version__


def test_pre_commit_runs_the_ruff_of_tox() -> None:
    (pinned,) = project_file()["dependency-groups"]["lint"]
    hooks = [h for r in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for h in r["hooks"]]
    of_ruff = [hook for hook in hooks if hook["entry"].startswith("ruff")]
    assert of_ruff
    assert all(hook["additional_dependencies"] == [pinned] for hook in of_ruff)
