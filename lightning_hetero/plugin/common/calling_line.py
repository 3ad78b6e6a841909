"""Find the user's line that has led to a call."""

from __future__ import annotations

import sys
import traceback
from types import FrameType

__all__ = ["called_by_library", "calling_line"]

_LIBRARIES = frozenset({
    "lightning", "lightning_fabric", "lightning_hetero", "lightning_utilities", "pytorch_lightning", "torch",
    "torchmetrics",
})  # fmt: skip


def _is_of_library(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES


def called_by_library(depth: int) -> bool:
    """Return whether a library's code has called the function that is ``depth`` calls above the caller of this one."""
    return _is_of_library(sys._getframe(depth + 2))


def calling_line() -> str:
    """Return file and line of the innermost call that is neither in this package nor in torch or Lightning."""
    for frame, line in traceback.walk_stack(None):
        if not _is_of_library(frame):
            return f"{frame.f_code.co_filename}:{line}"
    return "an unknown line"
