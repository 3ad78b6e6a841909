"""Which errors say that memory ran out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from lightning_hetero.exceptions import RankFailedError, RankOutOfMemoryError
from lightning_hetero.plugin.step.out_of_memory import is_out_of_memory

GB = 10**9


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.OutOfMemoryError("XPU out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.0 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported ..."), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("HIP error: out of memory\nHIP kernel errors might be asynchronously reported ..."), True),
        (RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("HIP error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuSOLVER error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), True),
        (RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), True),
        (RuntimeError("level zero backend failed", "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: ..."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (
            dist.DistBackendError(
                "NCCL error: Call to CUDA function failed. Last error: Cuda failure 2 'out of memory'"
            ),
            False,
        ),
        (RuntimeError("NCCL Error 1: unhandled cuda error, Cuda failure 2 'CUDA out of memory'"), False),
        (RankFailedError("Another rank has failed: Rank 1 (cuda:1) ran out of memory. (CUDA out of memory)"), False),
        (RankOutOfMemoryError("Rank 0 ran out of memory. (CUDA out of memory. Tried to allocate 2 GiB)"), False),
        (RuntimeError("DataLoader worker (pid 7) is killed. Workers may be out of shared memory."), False),
        (RuntimeError("CUDA error: too many resources requested for launch"), False),
        (MemoryError(), False),
        (KeyError("out of memory"), False),
    ],
)
def test_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


AMBIGUOUS = [
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: HIPBLAS_STATUS_NOT_INITIALIZED when calling `hipblasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "GET was unable to find an engine to execute this computation",
    "Unable to find an engine to execute this computation".lower(),
]


@pytest.mark.parametrize("text", AMBIGUOUS)
@pytest.mark.parametrize(
    ("free", "fraction", "expected"), [(30 * GB, 1.0, False), (GB, 1.0, True), (30 * GB, 0.5, True)]
)
def test_errors_of_several_causes_count_if_the_device_is_nearly_full(
    monkeypatch: pytest.MonkeyPatch, text: str, free: int, fraction: float, expected: bool
) -> None:
    """The device has 80 GB, of which this process holds 39; with a fraction of one half, 1 GB is left to it."""
    imitate_device(monkeypatch, lambda: (free, 80 * GB), fraction)
    assert is_out_of_memory(RuntimeError(text)) is expected
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_errors_of_several_causes_without_an_answer_of_a_device(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text)), "no CUDA device"

    def broken() -> tuple[int, int]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    imitate_device(monkeypatch, broken, 1.0)
    assert not is_out_of_memory(RuntimeError(text))


def imitate_device(monkeypatch: pytest.MonkeyPatch, info: Callable[[], tuple[int, int]], fraction: float) -> None:
    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "memory_reserved": 39 * GB,
        "get_per_process_memory_fraction": fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
