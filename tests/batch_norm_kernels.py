"""Kernels of synchronised batch normalisation for the CPU, so that torch's own function runs on CPU ranks.

They keep the contract of the CUDA kernels: statistics of half precision are computed and returned in float32.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm


def _accumulated(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _over(tensor: Tensor) -> list[int]:
    return [dim for dim in range(tensor.dim()) if dim != 1]


def _by_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape([1, -1] + [1] * (like.dim() - 2))


def batch_norm_stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _accumulated(input)
    return wide.mean(_over(wide)), (wide.var(_over(wide), correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    weights = counts.to(mean.dtype)[:, None]
    total = weights.sum()
    joint = (mean * weights).sum(0) / total
    variance = ((invstd**-2 - eps + (mean - joint) ** 2) * weights).sum(0) / total
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(joint.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * total / (total - 1)).to(running_var.dtype), momentum)
    return joint, (variance + eps).rsqrt()


def batch_norm_elemt(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    out = (_accumulated(input) - _by_channel(mean, input)) * _by_channel(invstd, input)
    if weight is not None and bias is not None:
        out = out * _by_channel(weight, input) + _by_channel(bias, input)
    return out.to(input.dtype)


def batch_norm_backward_reduce(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, slope = _accumulated(input), _accumulated(grad_out)
    sum_dy = slope.sum(_over(wide))
    sum_dy_xmu = (slope * (wide - _by_channel(mean, wide))).sum(_over(wide))
    dtype = wide.dtype if weight is None else weight.dtype
    return sum_dy, sum_dy_xmu, (sum_dy_xmu * invstd).to(dtype), sum_dy.to(dtype)


def batch_norm_backward_elemt(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    wide, slope, total = _accumulated(input), _accumulated(grad_out), count.sum()
    from_mean = _by_channel(sum_dy / total, wide)
    from_variance = (wide - _by_channel(mean, wide)) * _by_channel(invstd**2 * sum_dy_xmu / total, wide)
    scale = invstd if weight is None else invstd * weight
    return ((slope - from_mean - from_variance) * _by_channel(scale, wide)).to(input.dtype)


@cache
def _registered() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    for kernel in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):
        library.impl(kernel.__name__, torch.compiler.disable(kernel), "CPU")
    return library


@contextmanager
def synchronised_on_cpu() -> Iterator[None]:
    """Let ``nn.SyncBatchNorm`` and DDP around it run on CPU ranks in this context."""
    _registered()
    with (
        mock.patch.object(nn.SyncBatchNorm, "forward", _forward_on_cpu()),
        mock.patch.object(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle"),
    ):
        yield


@cache
def _forward_on_cpu() -> Any:
    """Return torch's own forward pass, which also accepts CPUs; it can be compiled as the original can."""
    source = textwrap.dedent(inspect.getsource(nn.SyncBatchNorm.forward))
    assert source.count('"cuda",') == 1
    names: dict[str, Any] = {}
    code = compile(source.replace('"cuda",', '"cuda", "cpu",'), batchnorm.__file__, "exec")
    exec(code, vars(batchnorm), names)
    return names["forward"]
