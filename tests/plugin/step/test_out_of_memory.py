"""Which errors say that memory ran out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_hetero.plugin.step.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.OutOfMemoryError("XPU out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.0 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: ..."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (
            dist.DistBackendError(
                "NCCL error: Call to CUDA function failed. Last error: Cuda failure 2 'out of memory'"
            ),
            False,
        ),
        (MemoryError(), False),
        (KeyError("out of memory"), False),
    ],
)
def test_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
