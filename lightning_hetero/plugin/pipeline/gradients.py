"""Combine the gradients of parameters that several ranks have, and clip by the norm of the whole model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.plugin.step.gradients import Gradients

__all__ = ["clip_by_norm", "with_tied_combined"]


def with_tied_combined(gradients: Gradients, placement: TensorPlacement) -> Gradients:
    """Return ``gradients``, in which those of parameters that several ranks have are added up over these ranks.

    Every rank must call this at the same point.
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
