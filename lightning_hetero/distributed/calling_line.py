"""Find the user's line that has led to a call."""

from __future__ import annotations

import sys
import traceback
from types import FrameType

__all__ = ["called_by_library", "calling_line", "is_of_library"]

# Those that call the user's code, and what their decorators are made of.
_LIBRARIES = frozenset({
    "contextlib", "functools", "lightning", "lightning_fabric", "lightning_hetero", "lightning_utilities",
    "pytorch_lightning", "torch", "torchmetrics", "typing_extensions",
})  # fmt: skip


def is_of_library(frame: FrameType) -> bool:
    """Return whether a frame runs code of torch, Lightning, torchmetrics or this package."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _LIBRARIES


def called_by_library(depth: int) -> bool:
    """Return whether a library's code has called the function that is ``depth`` calls above the caller of this one."""
    return is_of_library(sys._getframe(depth + 2))


def calling_line() -> str:
    """Return file and line of the innermost call that is neither in this package nor in torch or Lightning."""
    for frame, line in traceback.walk_stack(None):
        if not is_of_library(frame):
            return f"{frame.f_code.co_filename}:{line}"
    return "an unknown line"
