"""Find the layers of a LightningModule."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["layers_of"]


def layers_of(module: LightningModule) -> tuple[nn.Module, list[nn.Module]]:
    """Return the model that steps call, and the layers that it calls one after another.

    Raises:
        UnsupportedFeatureError: The module does not declare its layers.
    """
    called: Any = getattr(module, "model", module)
    for owner in (module, called):
        layers: Any = getattr(owner, "pipeline_layers", None)
        if callable(layers):
            return called, list(layers())
    if isinstance(called, nn.Sequential):
        return called, list(called)
    raise UnsupportedFeatureError(
        f"`hetero_pipeline` needs to know the layers: `self.model` must be an nn.Sequential, or the module must define"
        f" `pipeline_layers()`, got {type(module).__name__} with `self.model` of type {type(called).__name__}."
    )
