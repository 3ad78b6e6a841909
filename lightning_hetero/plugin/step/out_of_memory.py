"""Distinguish out-of-memory errors from others, and free what can be freed."""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.memory import is_oom_error

__all__ = ["free_memory", "is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that a device has no memory left for a computation.

    Not every device raises ``torch.OutOfMemoryError``: libraries with their own allocation raise their own errors.
    Errors of collectives do not count, because the peers take part in those.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, dist.DistError):
        return False
    return (
        is_oom_error(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error) or "MPS backend out of memory" in str(error)
    )


def free_memory(device: torch.device) -> None:
    """Free unreferenced objects and the memory that the allocator caches."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
