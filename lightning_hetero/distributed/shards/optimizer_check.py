"""Try an optimiser on a small parameter in parts, before it is used on those of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hetero.balance.shards.cuts import Cutter
from lightning_hetero.distributed.shards.shard_tensor import Division, ShardTensor

__all__ = ["why_not_in_parts"]

_SHAPE = (4, 6)
_STEPS = 3
_TOLERANCE = 1e-4  # of parameters of size one, in float32


def why_not_in_parts(optimizer: Optimizer, weights: Sequence[float], device: torch.device) -> str | None:
    """Return why an optimiser does not do with parts what it does with whole parameters; None if it does.

    A copy of the optimiser, with its settings, trains one small parameter. Every rank must call this at the same point.

    Args:
        optimizer: The optimiser.
        weights: One weight per rank, in proportion to which the ranks hold parts.
        device: Device of this rank.
    """
    sizes = Cutter(weights).cut(_SHAPE[0] * _SHAPE[1]).sizes
    division = Division(_SHAPE, sizes, dist.get_rank())
    for number, group in enumerate(optimizer.param_groups):
        try:
            whole = _trained(optimizer, group, device, lambda tensor: tensor)
        except Exception as error:
            return f"it cannot be tried on a parameter of shape {_SHAPE} (group {number}): {error}"
        try:
            in_parts = _trained(
                optimizer, group, device, lambda tensor: ShardTensor(division.part_of(tensor).clone(), division)
            )
            assert isinstance(in_parts, ShardTensor)
            found = in_parts.full_tensor()
        except Exception as error:
            return str(error)
        if not torch.allclose(found, whole, rtol=_TOLERANCE, atol=_TOLERANCE):
            return "it computes something else on parts of a parameter than on the whole"
    return None


def _trained(
    optimizer: Optimizer, group: dict[str, Any], device: torch.device, made: Callable[[Tensor], Tensor]
) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def drawn() -> Tensor:
        return made(torch.randn(_SHAPE, generator=generator).to(device))

    parameter = nn.Parameter(drawn())
    twin = _twin(optimizer, group, parameter)
    with torch.random.fork_rng(devices=[]):
        for _ in range(_STEPS):
            parameter.grad = drawn()
            type(optimizer).step(twin)
    return parameter.detach()


def _twin(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Optimizer:
    """Return a copy of an optimiser for one parameter, without what others have added to the original."""
    twin: Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name not in ("step", "state", "param_groups"):  # schedulers wrap `step`
            vars(twin)[name] = type(value)() if "hooks" in name and isinstance(value, dict) else value
    settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    if parameter.device.type == "cpu" and settings.get("capturable"):
        settings["capturable"] = False  # it would need an accelerator
    twin.state = type(optimizer.state)(dict)
    twin.param_groups = [{**settings, "params": [parameter]}]
    return twin
