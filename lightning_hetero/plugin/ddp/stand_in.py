"""Run a step on a stand-in and undo its effects.

If a ragged batch has no sample for a rank, the rank runs the step all the same, because its peers communicate in it: in
the backward pass, in synchronised batch normalisation, in logging. Its contribution is undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_hetero.distributed.torch_private import BatchNorm
from lightning_hetero.plugin.step.metrics import DiscardedUpdates, discarded_metrics

__all__ = ["stand_in"]

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def stand_in(module: LightningModule) -> Iterator[DiscardedUpdates]:
    """Run a step on a stand-in, and undo what it adds to metrics, to logged values and to statistics."""
    with discarded_metrics(module) as updates, _left_out_of_statistics(module), _kept_statistics(module):
        yield updates


@contextmanager
def _kept_statistics(module: nn.Module) -> Iterator[None]:
    """Undo what the step in this context adds to the running statistics of this rank's batch normalisation.

    Those that are synchronised over all ranks are the same on all of them, whoever has the samples, and stay so.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm) and layer.training]
    layers = [layer for layer in layers if not _is_of_all_ranks(layer)]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


def _is_of_all_ranks(layer: nn.Module) -> bool:
    # in another group there may be no sample at all
    return isinstance(layer, nn.SyncBatchNorm) and layer.process_group in (None, dist.group.WORLD)


@contextmanager
def _left_out_of_statistics(module: nn.Module) -> Iterator[None]:
    """Exclude the samples in this context from the statistics of synchronised batch normalisation.

    The rank takes part in the communication with an empty batch, which torch supports. Its own samples pass through
    unchanged; nobody uses the results. Compiled code ignores hooks that are added after it was compiled, so nothing
    runs compiled meanwhile; what the rank sends to its peers is the same.
    """
    handles: list[RemovableHandle] = []
    passing: dict[nn.Module, torch.Tensor] = {}

    def empty_input(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        passing[layer] = inputs[0]
        empty = inputs[0][:0]
        # peers send statistics of half precision in float32, and an empty batch sends zeros in its own type
        return (empty.float() if empty.dtype in _HALF else empty,)

    def input_as_output(layer: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        # adding the empty sum keeps the communication of the backward pass in the graph
        return passing.pop(layer) + output.sum()

    layers = [layer for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm) and layer.training]
    for layer in layers:
        handles += [layer.register_forward_pre_hook(empty_input), layer.register_forward_hook(input_as_output)]
    try:
        with torch.compiler.set_stance("force_eager") if layers else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()
