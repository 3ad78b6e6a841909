"""Data that users divide themselves is recognised by what its objects hold on all ranks; here without ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_hetero.distributed.data import divided_by_user
from lightning_hetero.distributed.data.divided_by_user import what_divides


class Part:
    """A dataset or sampler of one rank."""

    def __init__(self, **contents: Any) -> None:
        vars(self).update(contents)


def found(monkeypatch: pytest.MonkeyPatch, *parts: Any) -> str | None:
    """Return what is found if each rank's loader has one of these as its sampler."""
    loaders = [SimpleNamespace(sampler=part) for part in parts]
    facts = [{path: divided_by_user._facts(obj) for path, obj in divided_by_user._objects(one)} for one in loaders]
    monkeypatch.setattr(divided_by_user, "all_gather", lambda own: facts)
    return what_divides(loaders[0])


def test_parts_of_a_whole_divide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, Part(indices=[0, 2, 4]), Part(indices=range(1, 6, 2))) == "Part"
    assert found(monkeypatch, Part(files=["/a/x", "/a/y"]), Part(files=["/b/z", "/b/w"])) == "Part"
    assert found(monkeypatch, Part(number=0, of=2), Part(number=1, of=2)) == "Part"


@pytest.mark.parametrize(
    "parts",
    [
        (Part(indices=[0, 1]), Part(indices=[0, 1])),  # the same on both
        (Part(indices=[0, 1]), Part(indices=["a", "b"])),  # of another kind
        (Part(indices=[0, 1, None]), Part(indices=[2, 3, None])),
        (Part(indices=[0, 1]), Part(indices=[2])),  # too few to tell
        (Part(files=["/a/x", "/a/y"]), Part(files=["/b/x", "/b/z"])),  # each has a copy of one
        (Part(number=0), Part(number=1)),  # but not of how many
        (Part(indices=[0, 1]), None),  # nothing there on the other rank
        (Part(indices=[0] * 100 + [None]), Part(indices=[1] * 100 + [None])),  # what is no index comes late
    ],
    ids=range(8),
)
def test_what_is_no_part_divides_nothing(monkeypatch: pytest.MonkeyPatch, parts: tuple[Any, ...]) -> None:
    assert found(monkeypatch, *parts) is None


def test_a_single_rank_divides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, Part(indices=[0, 1])) is None
