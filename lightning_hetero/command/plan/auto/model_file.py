"""The layers of a model in a file: read them, from a person or from `lightning-hetero profile`, and write them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_hetero.command.plan.auto.model import Model, ModelLayer
from lightning_hetero.command.plan.fields import Fields
from lightning_hetero.command.plan.yaml_file import read_yaml
from lightning_hetero.exceptions import ConfigurationError, HeteroError

__all__ = ["model_document", "read_layers", "read_profile"]

VERSION = 1
_KEY = "lightning_hetero_profile"
_NUMBERS = tuple(field.name for field in fields(ModelLayer) if field.name != "name")
_BY_HAND = (
    *("forward_ms", "backward_ms", "overhead_ms", "parameter_megabytes", "activation_megabytes", "output_megabytes"),
    *("count", "name"),
)
_FORWARD_PART = 1 / 3  # a backward pass costs twice as much as a forward pass
_MAX_LAYERS = 4096


def model_document(model: Model, **described: Any) -> dict[str, Any]:
    """Return the document of a model.

    Args:
        model: The model.
        described: What the document says besides, about where the model was measured.
    """
    layers = [
        {"name": layer.name or f"layer {number}", **{name: getattr(layer, name) for name in _NUMBERS}}
        for number, layer in enumerate(model.layers)
    ]
    return {_KEY: VERSION, **described, "optimizer_states": model.optimizer_states, "layers": layers}


def read_profile(path: Path) -> Model:
    """Return the model that `lightning-hetero profile` has written to a file.

    Raises:
        ConfigurationError: It is no such file; the message names it.
    """
    found = read_yaml(path)  # JSON is YAML
    try:
        if not isinstance(found, dict) or found.get(_KEY) != VERSION:
            raise ConfigurationError(
                f"The file must be what `lightning-hetero profile --json` writes, with the key `{_KEY}: {VERSION}`."
            )
        top = Fields(found, sorted(found))
        layers = []
        for i, entry in enumerate(top.items("layers", "a list of layers")):
            layer = Fields(entry, ("name", *_NUMBERS), f"layers[{i}]")
            numbers = {name: layer.number(name, 0.0, above=None) for name in _NUMBERS}
            layers.append(ModelLayer(**numbers, name=layer.text("name", f"layer {i}")))
        return _checked(Model(tuple(layers), top.number("optimizer_states", 2.0, above=None)))
    except HeteroError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def read_layers(top: Fields) -> Model:
    """Return the model whose layers a person has written in milliseconds and megabytes per sample.

    Raises:
        ConfigurationError: A value is wrong; the message names its path.
    """
    layers: list[ModelLayer] = []
    for i, entry in enumerate(top.items("layers", "a list with one entry for each kind of layer")):
        one = Fields(entry, _BY_HAND, f"layers[{i}]")
        overhead_s = one.number("overhead_ms", 0.0, above=None) / 1e3
        layer = ModelLayer(
            one.number("forward_ms") / 1e3,
            one.number("backward_ms") / 1e3,
            overhead_s * _FORWARD_PART,
            overhead_s * (1 - _FORWARD_PART),
            1e6 * one.number("parameter_megabytes", 0.0, above=None),
            activation_bytes=1e6 * one.number("activation_megabytes", 0.0, above=None),
            output_bytes=1e6 * one.number("output_megabytes", 0.0, above=None),
            name=one.text("name", f"layer {i}"),
        )
        layers += [layer] * one.integer("count", 1, maximum=_MAX_LAYERS)
    if len(layers) > _MAX_LAYERS:
        raise ConfigurationError(f"`layers` must be at most {_MAX_LAYERS} in total, got {len(layers)}.")
    return Model(tuple(layers), top.number("optimizer_states", 2.0, above=None))


def _checked(model: Model) -> Model:
    if not any(layer.forward_s + layer.backward_s > 0 for layer in model.layers):
        raise ConfigurationError("`layers` must take some time per sample, got none. Measure with larger batches.")
    return model
