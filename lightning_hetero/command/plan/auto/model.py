"""Describe a model by what each of its layers takes, so that every strategy can be predicted from it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.balance.types import StepTime
from lightning_hetero.command.plan.cluster import SampleMemory

__all__ = ["Model", "ModelLayer"]


@dataclass(frozen=True)
class ModelLayer:
    """One layer, on a device of speed 1.

    Attributes:
        forward_s: Seconds of the forward pass per sample.
        backward_s: Seconds of the backward pass per sample.
        forward_overhead_s: Seconds of every forward pass, whatever its number of samples.
        backward_overhead_s: Seconds of every backward pass, whatever its number of samples.
        parameter_bytes: Size of the trained parameters.
        constant_bytes: Size of other parameters and of buffers.
        activation_bytes: Size of what is kept per sample for the backward pass.
        output_bytes: Size of the output per sample.
        name: Name to show.
    """

    forward_s: float
    backward_s: float
    forward_overhead_s: float = 0.0
    backward_overhead_s: float = 0.0
    parameter_bytes: float = 0.0
    constant_bytes: float = 0.0
    activation_bytes: float = 0.0
    output_bytes: float = 0.0
    name: str = ""


@dataclass(frozen=True)
class Model:
    """A model and its optimiser.

    Attributes:
        layers: The layers, in the order in which they are called.
        optimizer_states: Numbers that the optimiser keeps for each parameter: 2 for Adam, 0 for plain SGD.
    """

    layers: tuple[ModelLayer, ...]
    optimizer_states: float = 2.0

    @property
    def step_time(self) -> StepTime:
        """The time of a step of the whole model on a device of speed 1."""
        return StepTime(
            sum(layer.forward_overhead_s + layer.backward_overhead_s for layer in self.layers),
            sum(layer.forward_s + layer.backward_s for layer in self.layers),
        )

    @property
    def parameter_bytes(self) -> float:
        """The size of all trained parameters."""
        return sum(layer.parameter_bytes for layer in self.layers)

    @property
    def constant_bytes(self) -> float:
        """The size of everything else that does not depend on the batch."""
        return sum(layer.constant_bytes for layer in self.layers)

    @property
    def memory(self) -> SampleMemory:
        """What a device needs that holds the whole model: parameters, gradients, states and activations."""
        activation_bytes = sum(layer.activation_bytes for layer in self.layers)
        fixed_bytes = (2 + self.optimizer_states) * self.parameter_bytes + self.constant_bytes
        return SampleMemory(max(activation_bytes, 1.0), fixed_bytes)  # a device must have a limit
