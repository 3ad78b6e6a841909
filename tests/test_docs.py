"""What the documentation refers to exists: links, terms, code, configuration, arguments. Its first script runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy

import lightning_hetero
import lightning_hetero.testing

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
GLOSSARY = ROOT / "docs" / "reference" / "glossary.md"
CLASSES = {
    name: value
    for module in (lightning_hetero, lightning_hetero.testing)
    for name in module.__all__
    if inspect.isclass(value := getattr(module, name))
}
FENCE = re.compile(r"^```(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return [code for name, code in FENCE.findall(text) if name == language]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Return the relative links without a target."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def unknown_terms(text: str) -> set[str]:
    """Return the terms that the glossary does not define."""
    blocks_of_terms = FENCE.findall(GLOSSARY.read_text(encoding="utf-8"))
    defined = {
        line for name, code in blocks_of_terms if name == "{glossary}" for line in re.findall(r"^\S.*$", code, re.M)
    }
    used = re.findall(r"{term}`(?:[^`<]*<)?([^`>]+)>?`", text)
    return set(used) - defined


def arguments_of(name: str, *, passed_on: bool = False) -> set[str]:
    """Return what a constructor takes; ``passed_on``: with what it passes on to Lightning's."""
    parameters = inspect.signature(CLASSES[name]).parameters.values()
    own = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if passed_on and name == "HeteroFSDPStrategy":
        own |= arguments_of("HeteroDDPStrategy")
    if passed_on and len(own) < len(parameters):
        # what DDP takes beside these, DistributedDataParallel does
        return own | set(inspect.signature(DDPStrategy).parameters) | {"find_unused_parameters", "static_graph"}
    return own


def tables_of_arguments(text: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each table of arguments: the class that was named last before it, and the names in its first column."""
    for table in re.finditer(r"^\| argument \| meaning \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        named = re.findall(rf"\b({'|'.join(CLASSES)})\b", text[: table.start()])
        rows = [row.split("|")[1] for row in table.group(1).splitlines()]
        yield named[-1], {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def unknown_keywords(code: str) -> list[str]:
    """Return the keywords that code passes to a public class which does not take them."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [
        f"{call.func.id}({keyword.arg}=...)"
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in CLASSES
        for keyword in call.keywords
        if keyword.arg not in arguments_of(call.func.id, passed_on=True)
    ]


def unknown_init_args(configuration: Any) -> list[str]:
    """Return the classes and arguments in a configuration that do not exist."""
    if isinstance(configuration, list):
        return [name for part in configuration for name in unknown_init_args(part)]
    if not isinstance(configuration, dict):
        return []
    found = [name for part in configuration.values() for name in unknown_init_args(part)]
    path = str(configuration.get("class_path", ""))
    if path.startswith("lightning_hetero."):
        name = path.rpartition(".")[2]
        if name not in CLASSES:
            return [*found, path]
        known = arguments_of(name, passed_on=True)
        found += [f"{path}: {argument}" for argument in configuration.get("init_args", {}) if argument not in known]
    return found


@every_page
def test_what_a_page_refers_to_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert broken_links(page, text) == []
    assert unknown_terms(text) == set()
    for code in blocks(text, "python"):
        compile(code, str(page), "exec")
        assert unknown_keywords(code) == []
    for configuration in blocks(text, "yaml"):
        assert unknown_init_args(yaml.safe_load(configuration)) == []
    for name, named in tables_of_arguments(text):
        assert named <= arguments_of(name), name


@pytest.mark.parametrize("name", ["how_it_works", "shards"])
def test_pictures_are_what_their_scripts_draw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    drawn = importlib.import_module(f"draw_{name}").picture()
    assert drawn == (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")


def test_the_checks_can_fail() -> None:
    text = "# A title\n[a](#a-title) [b](#b) [c](c.md) [d](https://d.org/) `HeteroDDPStrategy`\n"
    text += "| argument | meaning |\n|---|---|\n| `share`, `limit` | none |\n"
    assert broken_links(PAGES[0], text.replace("(#a-title)", "(docs/how_to/pipeline.md#fix-the-stages)")) == [
        "#b",
        "c.md",
    ]
    assert unknown_terms("{term}`plan` {term}`plans <plan>` {term}`plot` {term}`plots <plots>`") == {"plot", "plots"}
    assert list(tables_of_arguments(text)) == [("HeteroDDPStrategy", {"share", "limit"})]
    assert unknown_keywords("LoadBalancer(steps=1, tune_steps=2)") == ["LoadBalancer(steps=...)"]
    assert unknown_init_args([{"class_path": "lightning_hetero.LoadBalancer", "init_args": {"steps": 1}}])
    assert unknown_init_args({"strategy": {"class_path": "lightning_hetero.HeteroDDP"}})


def test_every_page_is_in_the_index() -> None:
    entries = re.findall(r"^(\w+/\w+)$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [
        str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES if page.parent.parent == ROOT / "docs"
    ]
    assert sorted(entries) == pages


def test_the_commands_of_the_readme_are_those_of_ci() -> None:
    commands = "".join(blocks((ROOT / "README.md").read_text(encoding="utf-8"), "sh")).splitlines()
    assert {"pip install tox && tox -e demo", "pip install tox && tox"} <= set(commands)
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] in commands


@pytest.mark.parametrize("name", ["HeteroDDPStrategy", "HeteroFSDPStrategy", "HeteroPipelineStrategy", "LoadBalancer"])
def test_every_argument_is_in_a_table(name: str) -> None:
    tables = [table for page in PAGES for table in tables_of_arguments(page.read_text(encoding="utf-8"))]
    assert set().union(*(named for owner, named in tables if owner == name)) == arguments_of(name)


def test_the_first_script_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial" / "quick_start.md").read_text(encoding="utf-8")
    (code,) = blocks(
        text.partition("<!-- tests/test_docs.py runs this script -->\n")[2].partition("\n## ")[0], "python"
    )
    script = tmp_path / "first.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), "hetero_ddp"], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^hetero_ddp: \d+ samples/s$", done.stdout, re.MULTILINE)


PACKAGE = Path(lightning_hetero.__file__).parent
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=[str(path.relative_to(PACKAGE)) for path in WITH_EXAMPLES])
def test_examples_of_docstrings_are_true(path: Path) -> None:
    name = ".".join(("lightning_hetero", *path.relative_to(PACKAGE).with_suffix("").parts))
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed
