"""Find out by trying whether the backward pass of a layer can be split, and time its two parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_hetero.distributed.pipeline.passes.deferred import DeferredGradients
from lightning_hetero.hardware.timed_call import timed_call

__all__ = ["split_times"]

_TIMES = 3
# Of the largest gradient: sums in another order, in formats of 53, 24, 11 and 8 bits.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def split_times(
    layer: nn.Module, forward: Callable[[], Sequence[Tensor]], tensors: Sequence[Tensor], device: torch.device
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the seconds of some runs of both parts of a layer's backward pass; None if it has to be run whole.

    That is so if no gradients of parameters can be put off, if trying it fails, or if it gives other gradients.

    Args:
        layer: The layer.
        forward: Function that runs the layer on a fresh input and returns the tensors of its output.
        tensors: Parameters and buffers of the layer. Parameters have no gradients afterwards.
        device: Device on which the layer runs.
    """
    parameters = [t for t in tensors if t.requires_grad]
    if not parameters:
        return None
    deferred = DeferredGradients([layer])
    kept = [(t, t.detach().clone()) for t in tensors if not t.requires_grad]
    try:
        expected = _gradients(DeferredGradients([]), forward, parameters, device)[0]
        found: list[tuple[float, float]] = []
        for _ in range(_TIMES):
            _restore(kept)
            gradients, *seconds, count = _gradients(deferred, forward, parameters, device)
            if not count or not _agree(gradients, expected):
                return None
            found.append((seconds[0], seconds[1]))
    except Exception:
        return None
    finally:
        for parameter in parameters:
            parameter.grad = None
    return tuple(first for first, _ in found), tuple(second for _, second in found)


def _gradients(
    deferred: DeferredGradients,
    forward: Callable[[], Sequence[Tensor]],
    parameters: Sequence[Tensor],
    device: torch.device,
) -> tuple[list[Tensor | None], float, float, int]:
    """Return the gradients of parameters, how long the two parts took, and in how many pieces the second was."""
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(0)  # the same dropout; the caller restores the state of the generators
    with deferred.installed():
        outputs = [t for t in forward() if t.requires_grad and t.grad_fn is not None]
        with deferred.put_off() as jobs:
            _, input_s = timed_call(lambda: _backward(outputs), device)
        count = len(jobs)
        _, weight_s = timed_call(lambda: [job() for job in jobs], device)
    return [p.grad for p in parameters], input_s, weight_s, count


def _backward(outputs: Sequence[Tensor]) -> None:
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _restore(kept: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)


def _agree(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
            continue
        if a.dtype != b.dtype or a.layout != b.layout or a.shape != b.shape:
            return False
        x, y = a.to_dense().double(), b.to_dense().double()
        largest = float(y.abs().max()) if y.numel() else 0.0
        difference = float((x - y).abs().max()) if y.numel() else 0.0
        if not difference <= _TOLERANCE.get(b.dtype, 0.0) * largest:  # not a number is no agreement
            return False
    return True
