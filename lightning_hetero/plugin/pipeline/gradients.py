"""Combine the gradients of parameters that several ranks have, and clip by the norm of the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.plugin.step.gradients import Gradients

__all__ = ["begin_sums", "clip_by_norm", "with_tied_combined"]

Sums = Callable[[], Gradients]


def begin_sums(placement: TensorPlacement) -> Sums | None:
    """Begin to add up the gradients of a step over replicas; None if there are none.

    This rank has finished its passes, and others may still compute.

    Returns:
        Function that waits for the sums, which take the place of the gradients, and returns them.
    """
    if not placement.replicated:
        return None
    found = {id(p): p.grad for p in placement.parameters if p.grad is not None}
    begun = [copies.begin_sum(found) for copies in placement.replicated]
    return lambda: [pair for finish in begun for pair in finish()]


def with_tied_combined(gradients: Gradients, placement: TensorPlacement, sums: Sums | None) -> Gradients:
    """Return ``gradients``, in which those of parameters that several ranks have are added up over these ranks.

    Every rank must call this at the same point.

    Args:
        gradients: The gradients of a step on this rank.
        placement: Placement that says which ranks have which parameter.
        sums: What :func:`begin_sums` has returned for the step.
    """
    found = {id(parameter): gradient for parameter, gradient in gradients}
    combined: Gradients = []
    for parameter, group in placement.tied:
        if parameter.requires_grad:
            gradient = found.get(id(parameter), torch.zeros_like(parameter))
            dist.all_reduce(gradient, group=group)
            combined.append((parameter, gradient))
    told = [copies.tell(found) for copies in placement.copies]
    added = [copies.add_up(heard(), found) for copies, heard in zip(placement.copies, told, strict=True)]
    combined += [pair for added_up in added for pair in added_up()]
    combined += [] if sums is None else sums()
    tied = {id(parameter) for parameter, _ in combined}
    return [*((p, g) for p, g in gradients if id(p) not in tied), *combined]


def clip_by_norm(optimizer: Optimizer, clip_val: float, placement: TensorPlacement, device: torch.device) -> None:
    """Scale the gradients of this rank such that the norm of all ranks' gradients is at most ``clip_val``.

    Every rank must call this at the same point.

    Args:
        optimizer: Optimiser whose parameters' gradients are clipped.
        clip_val: Largest norm.
        placement: Placement that says which rank counts which parameter.
        device: Device of this rank.
    """
    own = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    squares = [p.grad.square().sum() for p in own if placement.counts(p)]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
    total = total.to(torch.float32 if device.type == "mps" else torch.float64)  # MPS has no other
    dist.all_reduce(total)
    nn.utils.clip_grads_with_norm_(own, clip_val, total.sqrt())
