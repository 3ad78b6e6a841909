"""Turn parts into whole tensors for a checkpoint and back, one tensor at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_hetero.distributed.shards.shard_tensor import ShardTensor
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["part_of_optimizer_state", "whole_optimizer_state", "whole_state", "whole_values"]

# torch keeps it as a number, whatever the shape of the parameter
_COUNTER = "step"


def whole_state(module: nn.Module, *, keep: bool) -> dict[str, Any]:
    """Return the state of a module with whole parameters, in the memory of the host.

    Every rank must call this at the same point. No rank holds more than one whole tensor on its device.

    Args:
        module: The module, whose parameters are in parts.
        keep: Whether this rank wants the result; otherwise it is empty.
    """
    names = dict(module.named_parameters(remove_duplicate=False))
    found: dict[str, Any] = {}
    by_parameter: dict[int, Tensor] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, ShardTensor):
            found[name] = value
            continue
        key = id(names[name]) if name in names else -1 - len(found)
        if key not in by_parameter:  # a tied parameter is one tensor, under several names
            whole = value.full_tensor()
            by_parameter[key] = whole.cpu() if keep else value
            del whole
        found[name] = by_parameter[key]
    return found if keep else {}


def whole_optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return the state of an optimiser as on one device, in the memory of the host.

    Every rank must call this at the same point. No rank holds more than one whole tensor on its device.

    Args:
        optimizer: The optimiser, whose parameters are in parts.
        keep: Whether this rank wants the result; otherwise it is empty.
    """

    def whole(value: Any) -> Any:
        if isinstance(value, ShardTensor):
            tensor = value.full_tensor()
            return tensor.cpu() if keep else None
        if isinstance(value, dict):
            return {name: whole(entry) for name, entry in value.items()}
        return value

    state = optimizer.state_dict()
    state = {**state, "state": {index: whole(of_parameter) for index, of_parameter in state["state"].items()}}
    return state if keep else {}


def whole_values(values: Any, *, keep: bool) -> Any:
    """Return containers in which tensors in parts, such as averages of weights, are whole, in the memory of the host.

    Every rank must call this at the same point.

    Args:
        values: Dictionaries, lists and tuples in each other.
        keep: Whether this rank wants the result; otherwise it has None in place of these tensors.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, ShardTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if keep else None

    return tree_map(whole, values)


def part_of_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state of one device as this rank loads it: this rank's part of each tensor.

    Args:
        optimizer: The optimiser, whose parameters are in parts.
        saved: The state.

    Raises:
        UnsupportedFeatureError: The state has a tensor that belongs to a parameter and has another shape.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def part(name: Any, value: Any, parameter: Any) -> Any:
        if isinstance(value, dict):
            return {key: part(key, entry, parameter) for key, entry in value.items()}
        if not isinstance(value, Tensor) or not isinstance(parameter, ShardTensor) or name == _COUNTER:
            return value
        if value.shape == parameter.shape:
            local = parameter.division.part_of(value).to(parameter.device, copy=True)
            return ShardTensor(local, parameter.division)
        if value.dim():
            raise UnsupportedFeatureError(
                f"`hetero_fsdp` cannot divide the optimiser's state {name!r} of shape {tuple(value.shape)}, which"
                f" belongs to a parameter of shape {tuple(parameter.shape)}. Use an optimiser whose states have the"
                f' shape of the parameter, or strategy="hetero_ddp".'
            )
        return value

    state = {
        index: part(None, of_parameter, parameters[index]) if isinstance(index, int) else of_parameter
        for index, of_parameter in saved["state"].items()
    }
    return {**saved, "state": state}
