"""Time work that is run only to be timed; training steps are timed without waiting (``step_timer``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["timed_call"]

Result = TypeVar("Result")


def timed_call(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return the result of ``call``, and the seconds until the device has finished it."""
    _finish(device)
    start_s = time.perf_counter()
    result = call()
    _finish(device)
    return result, time.perf_counter() - start_s


def _finish(device: torch.device) -> None:
    """Wait for what was asked of the device in the current stream.

    In another one, a message from a rank may be awaited that this rank has yet to do something for; waiting for the
    whole device would then never end.
    """
    if device.type == "cpu":
        return
    module = torch.get_device_module(device)
    if hasattr(module, "current_stream"):
        module.current_stream(device).synchronize()
    else:
        module.synchronize()  # a device with one stream, such as MPS
