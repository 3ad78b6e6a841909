"""Run layers that are called one after another, each with the output of the one before."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from lightning_hetero.distributed.pipeline.structure import Call

__all__ = ["Chain", "LayerCalls"]

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class LayerCalls(Protocol):
    """Knows how the layers of a model are called.

    Attributes:
        layers: All layers of the model, in the order of their calls.
    """

    layers: list[nn.Module]

    def prepare(self, call: Call) -> None:
        """Verify that the model can be split between its layers; every rank finds the same.

        Raises:
            UnsupportedFeatureError: It cannot.
        """
        ...

    def run(self, numbers: range, value: Any, call: Call | None) -> Any:
        """Return the output of some consecutive layers.

        Args:
            numbers: Numbers of the layers.
            value: Output of the layer before; ignored for the first layer of the model.
            call: The arguments with which the step calls the model, if :meth:`needs_call` asks for them.
        """
        ...

    def needs_call(self, numbers: range) -> bool:
        """Return whether some consecutive layers need the arguments with which the step calls the model."""
        ...


class Chain:
    """Layers of which each gets the output of the one before, and the first the positional arguments of the model.

    A keyword argument of the model's call reaches every layer whose ``forward`` has a parameter of that name; other
    layers than the first get their first parameter from the layer before.

    Args:
        layers: All layers of the model, in order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self._named = [_keywords(layer, first=number == 0) for number, layer in enumerate(self.layers)]

    def prepare(self, call: Call) -> None:
        """Do nothing: layers that are called one after another can be split anywhere."""

    def run(self, numbers: range, value: Any, call: Call | None) -> Any:
        """Return the output of some consecutive layers; see :class:`LayerCalls`."""
        for number in numbers:
            args = (value,) if number else () if call is None else call.args
            names = self._named[number]
            given = {} if call is None else call.kwargs
            value = self.layers[number](*args, **{k: v for k, v in given.items() if names is None or k in names})
        return value

    def needs_call(self, numbers: range) -> bool:
        """Return whether one of the layers is the first, or has parameters that a keyword argument may fill."""
        return any(number == 0 or self._named[number] != frozenset() for number in numbers)


def _keywords(layer: nn.Module, *, first: bool) -> frozenset[str] | None:
    """Return which keyword arguments of the model a layer takes; None for all."""
    parameters = list(inspect.signature(layer.forward).parameters.values())
    if first and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters[0 if first else 1 :] if p.kind in _NAMED)
