"""A process that is ended says why, wherever that can still be read."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import pytest

from lightning_hetero.distributed.group import end_process


def test_a_process_ends_though_its_log_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last words go to the standard error then."""
    ended: list[int] = []
    written: list[bytes] = []
    free = threading.Event()
    monkeypatch.setattr(end_process, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(end_process._log, "error", lambda *_: free.wait(5))
    monkeypatch.setattr(os, "write", lambda _, text: written.append(text))
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    end_process.end_process("why")
    free.set()
    assert (ended, written) == ([1], [b"why\n"])


def test_torchrun_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    end_process._record_for_torchrun("first")
    end_process._record_for_torchrun("second")
    message = json.loads(path.read_text(encoding="utf-8"))["message"]
    assert message["message"] == "RankFailedError: first"
    assert "RankFailedError: first" in message["extraInfo"]["py_callstack"]
