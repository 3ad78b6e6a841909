"""Find out by trial whether an optimiser needs the whole model on one rank.

The trial steps a copy of the optimiser with small parameters and made-up gradients, which cost nothing and change
nothing.  If the step of some parameters differs when the gradients of others do, or if the optimiser runs the training
step several times, it cannot work on stages, each of which steps its own parameters.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["why_whole_model"]

_STEPS = 10  # estimates of a step size for all parameters grow slowly
_SIDE = 3  # of the small parameters
_LARGE = 100.0


def why_whole_model(optimizer: Optimizer) -> str | None:
    """Return why an optimiser needs all parameters on one rank; None if it does not.

    Args:
        optimizer: Optimiser that has not made a step.

    Raises:
        Exception: Whatever the optimiser raises in the trial, which does not fit it then.
    """
    if sum(len(group["params"]) for group in optimizer.param_groups) < 2:
        return None
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        usual, runs = _stepped(optimizer, [1.0])
        if runs > _STEPS:
            return "runs the training step several times before it changes the parameters"
        # every other parameter, then one half: an optimiser may look at pairs, or at one group
        count = len(usual)
        for changed in ({*range(0, count, 2)}, {*range(count // 2)}):
            other, _ = _stepped(optimizer, [_LARGE if i in changed else 1.0 for i in range(count)])
            if any(not _equal(usual[i], other[i]) for i in range(count) if i not in changed):
                return "changes a parameter depending on the gradients of others, for example on the norm of all"
    return None


def _stepped(optimizer: Optimizer, scales: Sequence[float]) -> tuple[list[Tensor], int]:
    """Return small parameters after some steps, and how often the optimiser has run the training step."""
    torch.manual_seed(0)
    memo: dict[int, Any] = {}
    small: list[Tensor] = []
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = next((parameter.device for parameter in parameters if not parameter.is_meta), torch.device("cpu"))
    device = own if any(group.get("capturable") for group in optimizer.param_groups) else torch.device("cpu")
    # small changes must not be rounded away
    dtype = torch.float32 if device.type == "mps" else torch.float64
    for parameter in parameters:
        if id(parameter) not in memo:
            value = torch.randn([min(size, _SIDE) for size in parameter.shape], dtype=torch.float64)
            memo[id(parameter)] = nn.Parameter(value.to(device, dtype), parameter.requires_grad)
            small.append(memo[id(parameter)])
            for value in optimizer.state.get(parameter, {}).values():  # some have a state from the beginning
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    memo[id(value)] = _corner(value, device, dtype)
    trial = _copied(optimizer, memo)
    switch = getattr(trial, "train", None)  # of optimisers that have different parameters for evaluation
    if callable(switch):
        switch()
    gradients = [torch.randn_like(parameter) * scales[i % len(scales)] for i, parameter in enumerate(small)]
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        for parameter, gradient in zip(small, gradients, strict=True):
            if parameter.requires_grad:
                # a constant and a part that depends on the parameter, which is another one in each run
                parameter.grad = gradient + 0.1 * parameter.detach()
        return torch.ones((), device=small[0].device)

    for _ in range(_STEPS):
        trial.step(closure)
    return small, runs


def _corner(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    corner = value.detach()[tuple(slice(_SIDE) for _ in value.shape)]
    return (
        torch.zeros_like(corner, device=device, dtype=dtype) if value.is_meta else corner.to(device, dtype, copy=True)
    )


def _copied(optimizer: Any, memo: dict[int, Any]) -> Any:
    """Return a copy with the parameters that ``memo`` has for those of the optimiser.

    An optimiser's own copy loses the attributes that its class has added.
    """
    if id(optimizer) in memo:
        return memo[id(optimizer)]
    copied: Any = object.__new__(type(optimizer))
    memo[id(optimizer)] = copied
    for name, value in vars(optimizer).items():
        if name == "step" or callable(value):  # schedulers replace the method by one of the original
            continue
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            vars(copied)[name] = OrderedDict()
        else:
            vars(copied)[name] = _copied(value, memo) if isinstance(value, Optimizer) else copy.deepcopy(value, memo)
    return copied


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a, b) or ((a.isnan() == b.isnan()).all() and torch.equal(a.nan_to_num(), b.nan_to_num())))
