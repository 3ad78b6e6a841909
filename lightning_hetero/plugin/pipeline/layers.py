"""Find the layers of a LightningModule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric

from lightning_hetero.distributed.pipeline.chain import Chain, LayerCalls
from lightning_hetero.distributed.pipeline.replay import Replay
from lightning_hetero.distributed.pipeline.units import layers_in
from lightning_hetero.distributed.torch_private import BatchNorm
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Layers", "layers_of"]


@dataclass(frozen=True)
class Layers:
    """The layers of a module.

    Attributes:
        called: The model that steps call.
        calls: Its layers and how they are called.
        certain: Whether they are all of the model by definition, so that nothing has to be compared.
    """

    called: nn.Module
    calls: LayerCalls
    certain: bool

    @property
    def layers(self) -> list[nn.Module]:
        """All layers in order."""
        return self.calls.layers


def layers_of(module: LightningModule) -> Layers:
    """Return the model that steps call, and its layers.

    Raises:
        UnsupportedFeatureError: The layers cannot be found, or cannot be trained as they are.
    """
    called = _called(module)
    for owner in (module, called):
        declared: Any = getattr(owner, "pipeline_layers", None)
        if callable(declared):
            chain = Chain(list(declared()))
            _check_declared(module, chain.layers)
            return Layers(called, chain, certain=False)
    if isinstance(called, nn.Sequential) and type(called).forward is nn.Sequential.forward:
        chain = Chain(list(called))
        _check_shared(chain.layers)
        return Layers(called, chain, certain=True)
    model = getattr(called, "_orig_mod", called)  # of torch.compile, which knows the model only as a whole
    found = layers_in(model)
    if found:
        return Layers(called, Replay(model, found), certain=False)
    raise UnsupportedFeatureError(
        f"`hetero_pipeline` needs to know the layers: `self.model` must be an nn.Sequential, or the module must define"
        f" `pipeline_layers()`, or the model must consist of several blocks in an nn.ModuleList or an nn.Sequential,"
        f" got {type(module).__name__} with `self.model` of type {type(called).__name__}."
    )


def _called(module: LightningModule) -> nn.Module:
    model = getattr(module, "model", None)
    if isinstance(model, nn.Module):
        return model
    # self.net, self.backbone: whatever it is called, if there is nothing else
    children = [child for child in module.children() if child.state_dict() and not isinstance(child, Metric)]
    declares = callable(getattr(module, "pipeline_layers", None))
    return children[0] if len(children) == 1 and not declares else module


def _check_declared(module: LightningModule, layers: list[nn.Module]) -> None:
    """Refuse layers that were created for the pipeline alone, and have something to train."""
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for number, layer in enumerate(layers):
        saved = layer.state_dict(keep_vars=True)
        unknown = sorted(name for name, tensor in saved.items() if id(tensor) not in known)
        if unknown:
            raise UnsupportedFeatureError(
                f"`pipeline_layers()` must return layers whose parameters and buffers belong to the module, got"
                f" {unknown} of layer {number} ({type(layer).__name__}), which no optimiser and no checkpoint of the"
                f" module would contain. Create that layer in `__init__`, and assign it to an attribute."
            )
    _check_shared(layers)


def _check_shared(layers: list[nn.Module]) -> None:
    """Refuse running statistics that two layers share: on two ranks, each would follow half of the samples' ways."""
    first: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for part in {id(m): m for m in layer.modules()}.values():
            has_statistics = isinstance(part, BatchNorm) and part.track_running_stats
            if has_statistics and first.setdefault(id(part), number) != number:
                raise UnsupportedFeatureError(
                    f"Layers of `hetero_pipeline` cannot share batch normalisation, whose running statistics would"
                    f" differ between ranks, got one in layers {first[id(part)]} and {number}. Combine the two layers"
                    f" into one, or normalise each with its own."
                )
