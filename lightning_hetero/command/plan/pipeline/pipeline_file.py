"""Read the keys of ``strategy: hetero_pipeline``."""

from __future__ import annotations

from typing import cast

from lightning_hetero.balance.pipeline.stages import Schedule
from lightning_hetero.command.plan.fields import Fields
from lightning_hetero.command.plan.pipeline.pipeline_cluster import Layer, PipelineCluster, PipelineDevice
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["PIPELINE_KEYS", "read_pipeline"]

PIPELINE_KEYS = (
    *("strategy", "num_microbatches", "schedule", "batch_size", "transfer_ms", "optimizer_states", "devices"),
    *("layers", "layer_milliseconds", "layer_parameter_megabytes", "layer_activation_megabytes"),
)
_LAYER_KEYS = ("forward_ms", "backward_ms", "parameter_megabytes", "activation_megabytes")
_DEVICE_KEYS = ("name", "count", "speed", "memory_gigabytes")
_MAX_LAYERS = 4096
_MAX_MICRO_BATCHES = 1024
_MAX_DEVICES = 4096
_FORWARD_PART = 1 / 3  # a backward pass costs twice as much as a forward pass


def read_pipeline(top: Fields) -> PipelineCluster:
    """Return the devices and layers.

    Raises:
        ConfigurationError: A value is wrong; the message names its path.
    """
    devices: list[PipelineDevice] = []
    for i, entry in enumerate(top.items("devices", "a list with one entry for each kind of device")):
        fields = Fields(entry, _DEVICE_KEYS, f"devices[{i}]")
        memory = fields.optional_number("memory_gigabytes")
        device = PipelineDevice(fields.text("name"), fields.number("speed"), None if memory is None else 1e9 * memory)
        devices += [device] * fields.integer("count", 1, maximum=_MAX_DEVICES)
    micro_batches = top.integer("num_microbatches", 4, maximum=_MAX_MICRO_BATCHES)
    batch_size = top.optional_integer("batch_size")
    if batch_size is not None and batch_size < micro_batches:
        raise top.wrong("batch_size", f"at least `num_microbatches` ({micro_batches})")
    return PipelineCluster(
        devices=tuple(devices),
        layers=_read_layers(top),
        micro_batches=micro_batches,
        schedule=cast(Schedule, top.choice("schedule", ("1f1b", "gpipe"), "1f1b")),
        transfer_s=top.number("transfer_ms", 0.0, above=None) / 1e3,
        batch_size=batch_size,
        optimizer_states=top.number("optimizer_states", 2.0, above=None),
    )


def _read_layers(top: Fields) -> tuple[Layer, ...]:
    keys_of_equal_layers = ("layer_milliseconds", "layer_parameter_megabytes", "layer_activation_megabytes")
    found = top.value("layers", "the number of equal layers, or a list of layers")
    if not isinstance(found, list):
        number = top.integer("layers", maximum=_MAX_LAYERS)
        seconds = top.number("layer_milliseconds") / 1e3
        layer = Layer(
            seconds * _FORWARD_PART,
            seconds * (1 - _FORWARD_PART),
            1e6 * top.number("layer_parameter_megabytes", 0.0, above=None),
            1e6 * top.number("layer_activation_megabytes", 0.0, above=None),
        )
        return (layer,) * number
    for key in keys_of_equal_layers:
        if key in top:
            raise top.wrong(key, "left out with a list of layers", "Give it for each layer in the list.")
    if len(found) > _MAX_LAYERS:
        raise ConfigurationError(f"`layers` must have at most {_MAX_LAYERS} entries, got {len(found)}.")
    layers = []
    for i, one in enumerate(top.items("layers", "a list with one entry for each layer")):
        fields = Fields(one, _LAYER_KEYS, f"layers[{i}]")
        layers.append(
            Layer(
                fields.number("forward_ms") / 1e3,
                fields.number("backward_ms") / 1e3,
                1e6 * fields.number("parameter_megabytes", 0.0, above=None),
                1e6 * fields.number("activation_megabytes", 0.0, above=None),
            )
        )
    return tuple(layers)
