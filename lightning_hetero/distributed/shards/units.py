"""Find the units of a model: modules whose parameters are whole together, while their ``forward`` runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError

__all__ = ["Place", "PlannedParameter", "PlannedUnit", "find_units", "materialise", "plan_units"]

# A child with more of the model than this is divided further if it can be: whole, it would take too much memory.
_LARGEST_PART = 0.25


@dataclass(frozen=True)
class Place:
    """Where a parameter is registered."""

    module: nn.Module
    attribute: str

    def get(self) -> nn.Parameter:
        """Return what is registered now."""
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    def set(self, parameter: nn.Parameter) -> None:
        """Register another parameter; modules that keep a list of their parameters notice it."""
        setattr(self.module, self.attribute, parameter)


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter of a unit.

    Attributes:
        name: Its first name in the model.
        places: All places where it is registered; several if it is tied.
    """

    name: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class PlannedUnit:
    """A unit and its parameters; the module of the first unit, the root, is the whole model."""

    module: nn.Module
    parameters: tuple[PlannedParameter, ...]

    @property
    def owners(self) -> list[nn.Module]:
        """The modules that own parameters of the unit."""
        return list({id(place.module): place.module for p in self.parameters for place in p.places}.values())


def find_units(root: nn.Module, units: str | Sequence[type[nn.Module]] = "auto") -> list[nn.Module]:
    """Return the units of a model without the root, in the order of the model; none contains another.

    Args:
        root: The model.
        units: Classes whose modules are units; "auto" takes the children of lists and sequences of modules, and divides
            those further that hold much of the model.

    Raises:
        ConfigurationError: No module is of one of the classes.
    """
    if units == "auto":
        total = sum(p.numel() for p in root.parameters())
        return _distinct(_auto(root, total * _LARGEST_PART))
    classes = tuple(c for c in units if isinstance(c, type))
    found = _distinct(_outermost(root, classes))
    if not found:
        names = [c.__name__ for c in classes]
        raise ConfigurationError(
            f"`units` must name classes of modules of the model, got {names}, of which it has none. Name the class of"
            f' its blocks, or use "auto".'
        )
    return found


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def _outermost(module: nn.Module, classes: tuple[type[Any], ...]) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, classes):
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from _outermost(child, classes)


def _auto(module: nn.Module, largest: float) -> Iterator[nn.Module]:
    is_list = isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)
    for child in module.children():
        size = sum(p.numel() for p in child.parameters())
        if not size:
            continue
        deeper = list(_auto(child, largest)) if size > largest or not is_list or not _has_forward(child) else []
        if is_list and _has_forward(child) and len(deeper) < 2:
            yield child
        else:
            yield from deeper


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def plan_units(root: nn.Module, units: Sequence[nn.Module]) -> list[PlannedUnit]:
    """Return which parameters each unit holds.

    The root comes first. It also holds the parameters that several units share, and those of modules inside of a unit
    that can be reached without it, under another name: they may be used while the unit is not.
    """
    units_of: dict[int, set[int]] = {}
    for number, unit in enumerate(units, start=1):
        for module in unit.modules():
            units_of.setdefault(id(module), set()).add(number)
    for module in _without(root, {id(unit) for unit in units}):
        units_of.setdefault(id(module), set()).add(0)
    places: dict[int, list[Place]] = {}
    names: dict[int, str] = {}
    for prefix, module in root.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append(Place(module, attribute))
            names.setdefault(id(parameter), f"{prefix}.{attribute}" if prefix else attribute)
    held: list[list[PlannedParameter]] = [[] for _ in range(len(units) + 1)]
    for key, where in places.items():
        owners = set().union(*(units_of[id(place.module)] for place in where))
        held[owners.pop() if len(owners) == 1 else 0].append(PlannedParameter(names[key], tuple(where)))
    return [PlannedUnit(m, tuple(p)) for m, p in zip([root, *units], held, strict=True)]


def _without(module: nn.Module, units: set[int]) -> Iterator[nn.Module]:
    """Yield a module and those in it that can be reached without passing through a unit."""
    if id(module) not in units:
        yield module
        for child in module.children():
            yield from _without(child, units)


# ---- the meta device -------------------------------------------------------------------------------------------------


def materialise(unit: PlannedUnit, device: torch.device) -> None:
    """Give memory and initial values to the parameters of a unit that are on the meta device.

    Raises:
        UnsupportedFeatureError: A module cannot initialise its parameters itself.
    """
    for owner in unit.owners:
        own = [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            initialise(owner, own, device)
    for parameter in unit.parameters:
        first, *others = parameter.places
        for place in others:  # they were one parameter, and have become several
            place.set(first.get())


def initialise(owner: nn.Module, own: Sequence[torch.Tensor], device: torch.device) -> None:
    """Give memory and initial values to what a module on the meta device owns itself."""
    reset = getattr(owner, "reset_parameters", None) or getattr(owner, "_reset_parameters", None)
    if not callable(reset) or not all(tensor.is_meta for tensor in own):
        raise UnsupportedFeatureError(
            f"`hetero_fsdp` gives memory to modules on the meta device and lets their method `reset_parameters` write"
            f" initial values, but {type(owner).__name__} has none, or only some of its tensors are on the meta device."
            f" Add the method, or create this module on the processor."
        )
    owner.to_empty(device=device, recurse=False)
    with torch.no_grad():
        reset()
