"""The layers of a LightningModule, and which of its parameters and buffers live on which rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_hetero.balance.stages import StagePlan
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["PipelineModel", "layers_of"]


def layers_of(module: LightningModule) -> tuple[nn.Module, list[nn.Module]]:
    """Return what steps call, and the layers that it calls one after the other.

    Raises:
        UnsupportedFeatureError: the module does not say what its layers are.
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


class PipelineModel:
    """Keeps on this rank what its stage needs; everything else has a name and a shape, but no memory.

    Names, order and groups of parameters so stay those of the whole model, for optimisers and checkpoints. Parameters
    that are in no layer belong to the last stage, where losses are computed.

    Args:
        module: the user's.
        plan: the stages.
        rank: this rank.
    """

    def __init__(self, module: LightningModule, plan: StagePlan, rank: int) -> None:
        self._module = module
        self._rank = rank
        self.called, layers = layers_of(module)
        self.layers = [layers[i] for i in plan.layers(plan.stage_of(rank))]
        ranks_of: dict[int, set[int]] = {}
        for stage, owner in enumerate(plan.ranks):
            for i in plan.layers(stage):
                for tensor in (*layers[i].parameters(), *layers[i].buffers()):
                    ranks_of.setdefault(id(tensor), set()).add(owner)
        self._owners = {
            name: tuple(sorted(ranks_of.get(id(tensor), {plan.ranks[-1]}))) for name, tensor in _named(module)
        }
        self.tied: list[tuple[nn.Parameter, Any]] = []
        self._tied_sources: list[int] = []
        tied: dict[int, tuple[nn.Parameter, tuple[int, ...]]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if len(self._owners[name]) > 1:
                tied[id(parameter)] = (parameter, self._owners[name])
        for parameter, owners in tied.values():
            group = dist.new_group(list(owners))  # every rank has to call it
            if rank in owners:
                self.tied.append((parameter, group))
                self._tied_sources.append(owners[0])
        # a norm counts a parameter once
        self._counted = {id(p) for n, p in module.named_parameters() if self._owners[n][0] == rank}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters that live here."""
        return [p for p in self._module.parameters() if p.requires_grad and not p.is_meta]

    def counts(self, parameter: nn.Parameter) -> bool:
        """Return whether this rank is the one that counts ``parameter`` in a sum over all."""
        return id(parameter) in self._counted

    def keep_own(self, device: torch.device) -> None:
        """Move what lives here to ``device``, and free the rest."""
        placed: dict[int, Tensor] = {}
        for name, tensor in _named(self._module):
            if id(tensor) in placed:
                continue
            if self._rank in self._owners[name]:
                tensor.data = tensor.data.to(device)
                placed[id(tensor)] = tensor
            else:
                empty = torch.empty_like(tensor, device="meta")
                placed[id(tensor)] = (
                    nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                )
        self._replace(placed)
        for (parameter, group), source in zip(self.tied, self._tied_sources, strict=True):
            dist.broadcast(parameter.data, src=source, group=group)  # scripts that set no seed begin differently

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the whole module on rank 0, nothing elsewhere; every rank has to call it."""
        own = {name: _on_cpu(value) for name, value in self._module.state_dict().items() if not _is_meta(value)}
        parts = gather_on_zero(own)
        if parts is None:
            return {}
        merged = {name: value for part in reversed(parts) for name, value in part.items()}
        return {name: merged[name] for name in self._module.state_dict()}

    def load(self, state_dict: dict[str, Any], *, strict: bool) -> None:
        """Load what lives here; names and shapes of all are compared."""
        module = self._module
        own = {name for name, value in module.state_dict().items() if not _is_meta(value)}
        result = module.load_state_dict({name: v for name, v in state_dict.items() if name in own}, strict=False)
        missing = set(module.state_dict()) - set(state_dict)
        unexpected = set(state_dict) - set(module.state_dict())
        if strict and (missing or unexpected or result.unexpected_keys):
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(module).__name__}: missing {sorted(missing)}, unexpected"
                f" {sorted(unexpected)}."
            )

    def complete(self) -> None:
        """Bring the parameters and buffers of all stages to every rank's CPU; every rank has to call it."""
        own = {name: _on_cpu(t.detach()) for name, t in _named(self._module) if self._owners[name][0] == self._rank}
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        values = {name: value for part in parts for name, value in part.items()}
        placed: dict[int, Tensor] = {}
        for name, tensor in _named(self._module):
            if not tensor.is_meta:
                tensor.data = tensor.data.cpu()
                placed[id(tensor)] = tensor
            elif id(tensor) not in placed:
                value = values[name]
                placed[id(tensor)] = (
                    nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                )
        self._replace(placed)

    def _replace(self, placed: dict[int, Tensor]) -> None:
        """Put tensors in the place of those with the identities given, wherever they are used."""
        for module in self._module.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = placed[id(tensor)]  # type: ignore[assignment]
        self._counted = {id(p) for n, p in self._module.named_parameters() if self._owners[n][0] == self._rank}


def gather_on_zero(value: Any) -> list[Any] | None:
    """Return the values of all ranks on rank 0, None elsewhere."""
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, parts, dst=0)
    return parts


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
