"""What was measured of a model, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from lightning_hetero.command.plan.auto.model import Model
from lightning_hetero.command.plan.plan_text import console, short

__all__ = ["Measured", "print_model"]

_SHOWN_LAYERS = 60


@dataclass(frozen=True)
class Measured:
    """A model as it was measured.

    Attributes:
        model: What its layers take.
        device: Name of the device.
        samples: Number of samples of the larger batch.
    """

    model: Model
    device: str
    samples: int


def print_model(measured: Measured) -> None:
    """Print a row per layer, and what the whole model takes."""
    out, model, samples = console(), measured.model, measured.samples
    out.print(f"{len(model.layers)} layers on {measured.device}, with {samples} samples:")
    table = Table()
    table.add_column("layer", max_width=30, overflow="fold")
    for heading in ("forward ms", "backward ms", "parameters MB", "activations MB", "output MB"):
        table.add_column(heading, justify="right")
    for layer in model.layers[:_SHOWN_LAYERS]:
        table.add_row(
            layer.name,
            short(1e3 * (layer.forward_overhead_s + samples * layer.forward_s)),
            short(1e3 * (layer.backward_overhead_s + samples * layer.backward_s)),
            short(layer.parameter_bytes / 1e6),
            short(samples * layer.activation_bytes / 1e6),
            short(samples * layer.output_bytes / 1e6),
        )
    out.print(table)
    if len(model.layers) > _SHOWN_LAYERS:
        out.print(f"and {len(model.layers) - _SHOWN_LAYERS} more layers; --json lists all of them")
    time, memory = model.step_time, model.memory
    out.print(
        f"- a step takes {short(1e3 * time.overhead_s)} ms, and {short(1e3 * time.seconds_per_sample)} ms per sample\n"
        f"- a device that holds all of it needs {memory.fixed_bytes / 1e9:.3g} GB for {model.parameter_bytes / 1e6:.4g}"
        f" MB of parameters, their gradients and {model.optimizer_states:g} states, and"
        f" {short(memory.bytes_per_sample / 1e6)} MB per sample"
    )
