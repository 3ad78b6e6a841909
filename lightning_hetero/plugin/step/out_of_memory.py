"""Distinguish out-of-memory errors from others, and free what can be freed."""

from __future__ import annotations

import gc
import re

import torch
import torch.distributed as dist

from lightning_hetero.exceptions import HeteroError
from lightning_hetero.hardware.memory import is_nearly_full

__all__ = ["free_memory", "is_out_of_memory"]

# Allocators, drivers and libraries of CUDA, ROCm, MPS and processors, none of which has an exception type of its own.
_CERTAIN = re.compile(
    r"\b(CUDA|HIP|XPU|MPS)\b.*\bout of memory\b|OUT_OF_(DEVICE_)?MEMORY\b|OutOfMemory\b|ALLOC(ATION)?_FAILED\b"
    r"|rocblas_status_memory_error|miopenStatusAllocFailed|DefaultCPUAllocator: (can't allocate|not enough) memory"
)
# They mean a lack of memory, or something else, for example a broken installation or an unsupported operation.
_AMBIGUOUS = re.compile(
    r"BLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_(NOT_INITIALIZED|NOT_SUPPORTED|INTERNAL_ERROR)|unable to find an engine"
)
# Peers take part in collectives, so they cannot be repeated.
_COLLECTIVE = re.compile("nccl", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that a device has no memory left for a computation.

    Not every device raises ``torch.OutOfMemoryError``: libraries with their own allocation raise their own errors.
    Errors that have other causes as well count if the current device is nearly full. Errors of collectives do not
    count, because the peers take part in those, and neither do this package's own, which quote the errors of peers.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, dist.DistError | HeteroError):
        return False
    text = str(error)
    if _COLLECTIVE.search(text):
        return False
    return bool(_CERTAIN.search(text)) or (bool(_AMBIGUOUS.search(text)) and is_nearly_full())


def free_memory(device: torch.device) -> None:
    """Free unreferenced objects and the memory that the allocator caches."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
