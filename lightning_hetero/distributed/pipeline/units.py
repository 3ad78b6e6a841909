"""Find the layers of models that nobody has prepared for a pipeline: of transformers, timm, torchvision and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from torch import nn

__all__ = ["layers_in", "register_layers"]

Layer = nn.Module | tuple[nn.Module, ...]
Found = Callable[[Any], Sequence[Layer]]

_registered: dict[str, Found] = {}

# Names under which an entry of a stack keeps a stack of its own.
_NESTED_STACKS = ("blocks", "layers", "h")


def register_layers(model_class: type[nn.Module] | str, layers: Found) -> None:
    """Tell `hetero_pipeline` the layers of a class of models.

    Most models need no entry: their layers are found. The model's own forward pass calls the layers, so masks,
    positions and whatever else it computes between them need not be layers. A layer may use the model's inputs, and of
    the earlier layers only the output of the one before it.

    Args:
        model_class: The class, or its name, so that its library need not be imported. Derived classes are included.
        layers: Function that takes a model and returns its layers in the order in which the model calls them. A layer
            is a module within the model, or a tuple of modules that are never separated.

    Example::

        register_layers("MyDecoder", lambda model: [model.embedding, *model.blocks, model.head])
    """
    _registered[model_class if isinstance(model_class, str) else model_class.__qualname__] = layers


# Models whose order of attributes is not that of their calls.
register_layers("OPTForCausalLM", lambda model: _opt(model.model.decoder, model.lm_head))


def _opt(decoder: Any, head: nn.Module) -> list[Layer]:
    first, *others = decoder.layers
    embedding = [decoder.embed_tokens, decoder.project_in, decoder.embed_positions, first]  # they are added up
    rest = [*others, decoder.final_layer_norm, decoder.project_out, head]
    return [tuple(m for m in embedding if m is not None), *(m for m in rest if m is not None)]


def layers_in(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Return the layers of a model in the order in which it probably calls them; empty if there are none to separate.

    A layer is one module, or several that are called one after another.
    """
    found: list[Layer] = []
    _collect(model, found, is_entry=False, is_model=True)
    layers: list[tuple[nn.Module, ...]] = []
    seen: set[int] = set()
    for layer in found:
        modules = tuple(m for m in (layer if isinstance(layer, tuple) else (layer,)) if id(m) not in seen)
        seen.update(map(id, modules))
        if modules:
            layers.append(modules)
    summed = len(list(takewhile(lambda layer: len(layer) == 1 and isinstance(layer[0], nn.Embedding), layers)))
    if summed > 1:  # the sum of the embeddings of tokens and positions is the first thing that can be handed on
        layers[: summed + 1] = [tuple(module for layer in layers[: summed + 1] for module in layer)]
    return layers if len(layers) > 1 else []


def _collect(module: nn.Module, found: list[Layer], *, is_entry: bool, is_model: bool = False) -> None:
    registered = next(
        (_registered[name] for k in type(module).__mro__ if (name := k.__qualname__) in _registered), None
    )
    if registered is not None:
        found.extend(registered(module))
    elif isinstance(module, nn.ModuleList) or (_is_sequence(module) and not (is_entry and _is_flat(module))):
        for child in _children(module):
            _collect(child, found, is_entry=True)
    elif is_model or (_stages(module) if is_entry else _has_one_stack(module)):
        whole = _decoder_of(module)
        for child in _children(module):
            if child is whole:
                found.append(child)
            else:
                _collect(child, found, is_entry=False)
    else:
        found.append(module)


def _decoder_of(module: nn.Module) -> nn.Module | None:
    """Return the decoder beside an encoder: each of its layers uses the encoder's output, so they stay together."""
    return getattr(module, "decoder", None) if hasattr(module, "encoder") else None


def _children(module: nn.Module) -> list[nn.Module]:
    """Return the children that have something to train or to save; others run wherever the model calls them."""
    return [child for child in module.children() if child.state_dict()]


def _stages(module: nn.Module) -> bool:
    """Return whether an entry of a stack holds a stack itself, as the stages of ConvNeXt and Swin do."""
    return any(_holds_stack(child) for name, child in module.named_children() if name in _NESTED_STACKS)


def _has_one_stack(module: nn.Module) -> bool:
    """Return whether a module holds one stack of blocks; several of them are branches that run side by side."""
    whole = _decoder_of(module)
    holding = [
        child for child in _children(module) if child is not whole and any(map(_is_stack_of_blocks, child.modules()))
    ]
    return len(holding) == 1


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_flat(module: nn.Module) -> bool:
    """Return whether no child has children, as in a block of a convolution, its normalisation and its activation."""
    return not any(True for child in module.children() for _ in child.children())


def _holds_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) or _is_sequence(module)


def _is_stack_of_blocks(module: nn.Module) -> bool:
    """Return whether a module is a list of several modules that themselves have several parts."""
    return _holds_stack(module) and sum(any(True for _ in child.children()) for child in _children(module)) > 1
