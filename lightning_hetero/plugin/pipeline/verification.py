"""Compare what the layers of a pipeline compute with what the model itself computes, before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_hetero.distributed.collectives import all_gather, broadcast_from
from lightning_hetero.distributed.pipeline.borrowed import (
    borrowed,
    buffers_kept,
    changed_attributes,
    evaluating,
    state_kept,
)
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.distributed.pipeline.structure import Call, mapped
from lightning_hetero.distributed.torch_private import tensor_without_memory
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.hardware.memory import meter_of
from lightning_hetero.plugin.pipeline.layers import Layers

__all__ = ["verify_layers"]

# Of the largest value: the same operations in another order, in formats of 8, 11, 24 and 53 bits.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_LEAST_FREE = 1.5  # of the model's size, so that its own pass has memory, too


def verify_layers(
    module: LightningModule,
    layers: Layers,
    placement: TensorPlacement,
    evaluate: Callable[[Call], list[Any]],
    leader: int,
    call: Call,
) -> None:
    """Compare the output of the layers with that of the model; every rank must call this at the same point.

    Both run without dropout, and nothing remains of them. The last rank borrows the tensors of all stages for it. Where
    it has no memory for them, only shapes are compared.

    Args:
        module: The user's LightningModule.
        layers: The layers of the model that its steps call.
        placement: Placement of the layers on the ranks.
        evaluate: Function that runs the layers on all ranks, and returns the output on the last stage alone.
        leader: Rank of the last stage.
        call: Arguments of the model for a micro-batch, the same on every rank.

    Raises:
        UnsupportedFeatureError: The layers compute something else than the model; raised on every rank.
    """
    if layers.certain:
        return
    own = placement.own_layers
    cuda = [module.device] if module.device.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.random.fork_rng(cuda),
        state_kept(module, *own),
        buffers_kept(own),
        evaluating(module, *layers.layers),
    ):
        with changed_attributes(own) as changed:
            outputs = evaluate(_copied(call))
        by_value = broadcast_from(bool(outputs) and _fits(module), leader)
        copies = placement.broadcast_all(leader) if by_value else _without_memory(module)
        verdict = _Verdict(None, None)
        if outputs:
            verdict = _compared(layers, module, copies, _copied(call), outputs[0], by_value=by_value)
        del copies
    verdict = broadcast_from(verdict, leader)
    kept = sorted({name for names in all_gather(changed) for name in names})
    if verdict.difference is not None:
        raise UnsupportedFeatureError(verdict.difference)
    if verdict.note is not None:
        rank_zero_info(verdict.note)
    if kept:
        rank_zero_warn(
            f"hetero_pipeline: layers keep {', '.join(kept)} while they run. That stays on the rank of the layer, once"
            f" per micro-batch; the step, hooks and other layers may be on another rank. Return it from the layer if"
            f" anything else needs it."
        )


class _Verdict:
    """What a comparison has found.

    Args:
        difference: How the layers differ from the model; None if they do not.
        note: What could not be compared; None if everything was.
    """

    def __init__(self, difference: str | None, note: str | None) -> None:
        self.difference = difference
        self.note = note


def _compared(
    layers: Layers, module: LightningModule, copies: dict[str, Tensor], call: Call, output: Any, *, by_value: bool
) -> _Verdict:
    called = layers.called
    try:
        with borrowed(module, copies):
            expected = called.forward(*call.args, **call.kwargs)
    except Exception as error:
        return _Verdict(None, f"hetero_pipeline: the layers were not compared with {_named(called)}: {error}")
    difference = _difference(output, expected, by_value=by_value)
    if difference is None:
        return _Verdict(
            None,
            None if by_value else "hetero_pipeline: the layers were compared with the model by shape only, for memory",
        )
    missing = _in_no_layer(called, layers)
    return _Verdict(
        f"The layers of `hetero_pipeline` must compute what {_named(called)} computes, got {difference}."
        + (f" No layer contains {missing}." if missing else "")
        + " Correct `pipeline_layers()`, or leave it out if the model calls its layers itself.",
        None,
    )


def _difference(found: Any, expected: Any, *, by_value: bool) -> str | None:
    leaves = _leaves(found)
    for where, y in _leaves(expected).items():
        x = leaves.get(where)
        if not isinstance(y, Tensor) or (x is None and where):
            continue  # nothing to compare, or the output of an earlier stage, which the last one does not have
        if not isinstance(x, Tensor) or x.shape != y.shape:
            name = f"tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            return f"a {name} instead of a tensor of shape {tuple(y.shape)}"
        if not by_value or not x.numel():
            continue
        distance = float((x.double() - y.double()).abs().nan_to_num(nan=float("nan")).max()) if x.numel() else 0.0
        scale = max(float(y.double().abs().max()), 1e-30)
        if distance > _TOLERANCE.get(_coarser(x.dtype, y.dtype), 0.0) * scale:
            return f"values that differ by up to {distance:.2g} where the largest is {scale:.2g}"
    return None


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return max((a, b), key=lambda dtype: _TOLERANCE.get(dtype, 0.0))


def _leaves(value: Any, where: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Return what a nested structure holds by its place."""
    if isinstance(value, Mapping | list | tuple):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {place: leaf for key, entry in entries for place, leaf in _leaves(entry, (*where, key)).items()}
    return {where: value}


def _in_no_layer(called: nn.Module, layers: Layers) -> list[str]:
    known = {id(p) for layer in layers.layers for p in layer.parameters()}
    return [name for name, p in called.named_parameters() if id(p) not in known]


def _named(called: nn.Module) -> str:
    return f"`{type(called).__name__}.forward()`"


def _copied(call: Call) -> Call:
    """Return the call with copies of its tensors, which layers may change in place."""

    def copy(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return Call(mapped(call.args, copy), mapped(call.kwargs, copy))


def _without_memory(module: nn.Module) -> dict[str, Tensor]:
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    device = torch.device("cpu")
    return {name: tensor_without_memory(t.shape, t.dtype, device) for name, t in named}


def _fits(module: LightningModule) -> bool:
    needed = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    meter = meter_of(module.device)
    use = None if meter is None else meter.read()
    if use is not None:
        return use.available_bytes > _LEAST_FREE * needed
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return True
    return free > _LEAST_FREE * needed
