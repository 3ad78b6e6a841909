"""Put off the gradients of parameters in a backward pass: nobody waits for them, but for those of a stage's input.

Linear layers, convolutions and embeddings only note in the backward pass what their parameters' gradients are computed
from.  All other layers compute them at once.  So the graph of the whole backward pass runs once, with its hooks and
recomputed checkpoints.  What is put off accumulates on the parameters as usual, and their hooks are called then.

A parameter is hidden from the graph, since autograd would call its hooks without a gradient.  The graph has an anchor
in its place, which is reached exactly when a backward pass would have reached the parameter: not where something
computes the gradients of other tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812
from torch.nn import grad as convolution

from lightning_hetero.distributed.torch_private import version_of

__all__ = ["DeferredGradients", "Job", "put_off_with"]

Job = Callable[[], None]
_Forward = Callable[..., Tensor]
_collecting: list[DeferredGradients] = []


def put_off_with(layer: nn.Module, job: Job) -> bool:
    """Put off a function together with a layer's gradients, if the current backward pass does that.

    Args:
        layer: The layer.
        job: The function.

    Returns:
        Whether it was put off.
    """
    if not _collecting or not _collecting[-1].covers(layer):
        return False
    _collecting[-1].add(job)
    return True


class DeferredGradients:
    """Gradients of parameters that are computed later.

    Args:
        layers: The layers whose parameters' gradients may be put off.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        parts = {id(part): part for layer in layers for part in layer.modules()}
        # what is compiled has its own backward pass
        compiled = {
            id(p) for part in parts.values() if type(part).__name__ == "OptimizedModule" for p in part.modules()
        }
        self._parts = [part for key, part in parts.items() if key not in compiled]
        self._installed: set[int] = set()  # identities of modules
        self._jobs: list[Job] | None = None
        self._casts: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the layers note their gradients in this context, which includes their forward and backward passes."""
        changed: list[nn.Module] = []
        try:
            for part in self._parts:
                replace = _REPLACED.get(type(part))
                if replace is not None and "forward" not in vars(part):
                    vars(part)["forward"] = partial(replace, self, part)
                    changed.append(part)
            self._installed = {id(part) for part in changed}
            yield
        finally:
            self._installed = set()
            for part in changed:
                del vars(part)["forward"]
            self._casts.clear()

    @contextmanager
    def put_off(self) -> Iterator[list[Job]]:
        """Collect what the backward pass in this context leaves to be computed: call each of the functions once."""
        before, self._jobs = self._jobs, []
        _collecting.append(self)
        try:
            yield self._jobs
        finally:
            _collecting.remove(self)
            self._jobs = before

    def covers(self, layer: nn.Module) -> bool:
        """Return whether gradients of a layer's parameters are put off in the current context."""
        return any(
            id(part) in self._installed and any(p.requires_grad for p in part.parameters()) for part in layer.modules()
        )

    def add(self, job: Job) -> None:
        """Note a function that computes gradients; outside of :meth:`put_off` it is called at once."""
        if self._jobs is None:
            job()
        else:
            self._jobs.append(job)

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a parameter in another data type: cast once for all micro-batches, as autocast does."""
        if parameter.dtype == dtype:
            return parameter.detach()
        key, version = (id(parameter), dtype), version_of(parameter)
        known = self._casts.get(key)
        if known is None or known[0] != version:
            known = self._casts[key] = version, parameter.detach().to(dtype)
        return known[1]


class _Noted:
    """One call of a layer.

    Args:
        deferred: Where its gradients are noted.
        parameters: Its weight and its bias, or None.
        job: Function that accumulates their gradients, given the gradient of the output and the input.
    """

    def __init__(
        self, deferred: DeferredGradients, parameters: tuple[Tensor, Tensor | None], job: Callable[..., None]
    ) -> None:
        self.deferred = deferred
        self.parameters = parameters
        self.job = job
        self._given: tuple[Tensor, Tensor] | None = None

    def anchor(self, device: torch.device) -> Tensor:
        """Return what stands for the parameters in the graph."""
        leaf = torch.empty(0, device=device, requires_grad=True)
        found: Tensor = _Anchor.apply(leaf, self)  # type: ignore[no-untyped-call]
        return found

    def note(self, gradient: Tensor, given: Tensor) -> None:
        """Note what the layer's backward pass knows."""
        self._given = gradient, given

    def reached(self) -> None:
        """Put off the gradients of the parameters, which the backward pass has reached."""
        assert self._given is not None, "the anchor is an input of the layer"
        gradient, given = self._given
        self._given = None
        versions = version_of(gradient), version_of(given)

        def run() -> None:
            if (version_of(gradient), version_of(given)) != versions:
                raise RuntimeError(
                    "A layer's input must stay as it is until the gradients of its parameters are computed, but it was"
                    ' changed in place after its backward pass. Use a copy of it, or schedule="1f1b".'
                )
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                self.job(self.parameters, gradient, given)

        self.deferred.add(run)


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, noted: _Noted) -> Tensor:
        ctx.noted = noted
        return leaf.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.noted.reached()
        return gradient, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, weight: _Hidden, bias: _Hidden, noted: _Noted) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x, weight.tensor)
        ctx.noted = noted
        return F.linear(x, weight.given, bias.tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.noted.note(gradient, x)
        with torch.autocast(gradient.device.type, enabled=False):
            back = gradient @ weight if ctx.needs_input_grad[0] else None
        return back, gradient.new_empty(0, dtype=torch.get_default_dtype()), None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,  # noqa: ARG004
        weight: _Hidden,
        bias: _Hidden,
        noted: _Noted,
        module: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight.tensor)
        ctx.noted, ctx.module = noted, module
        return _of(module, "")(x, weight.given, bias.tensor, *_settings(module))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.noted.note(gradient, x)
        back = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(gradient.device.type, enabled=False):
                back = _of(ctx.module, "_input")(x.shape, weight, gradient, *_settings(ctx.module))
        return back, gradient.new_empty(0, dtype=torch.get_default_dtype()), None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, noted: _Noted, look_up: _Forward) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x)
        ctx.noted = noted
        return look_up(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.noted.note(gradient, *ctx.saved_tensors)
        return None, gradient.new_empty(0, dtype=torch.get_default_dtype()), None, None


class _Hidden:
    """Hides a tensor from the graph.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    @property
    def given(self) -> Tensor:
        assert self.tensor is not None
        found: Tensor = self.tensor
        return found


def _linear(deferred: DeferredGradients, module: nn.Linear, x: Tensor) -> Tensor:
    if not _can_be_noted(module, x):
        return nn.Linear.forward(module, x)
    noted = _Noted(deferred, (module.weight, module.bias), _accumulate_linear)
    x, weight, bias = _cast(deferred, module, x)
    # in two dimensions, because layers may change the output in place, which is a view of what the function returns
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _Linear.apply(flat, noted.anchor(x.device), weight, bias, noted)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


def _accumulate_linear(parameters: tuple[Tensor, Tensor | None], gradient: Tensor, x: Tensor) -> None:
    weight, bias = parameters
    _accumulate(weight, gradient.t() @ x)
    if bias is not None and bias.requires_grad:
        _accumulate(bias, gradient.sum(0))


def _convolution(deferred: DeferredGradients, module: Any, x: Tensor) -> Tensor:
    can = module.padding_mode == "zeros" and not isinstance(module.padding, str) and x.dim() == module.weight.dim()
    if not can or not _can_be_noted(module, x):
        found: Tensor = type(module).forward(module, x)
        return found
    noted = _Noted(deferred, (module.weight, module.bias), partial(_accumulate_convolution, module))
    x, weight, bias = _cast(deferred, module, x)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _Convolution.apply(x, noted.anchor(x.device), weight, bias, noted, module)  # type: ignore[no-untyped-call]
    return y


def _accumulate_convolution(module: Any, parameters: tuple[Tensor, Tensor | None], gradient: Tensor, x: Tensor) -> None:
    weight, bias = parameters
    _accumulate(weight, _of(module, "_weight")(x, weight.shape, gradient, *_settings(module)))
    if bias is not None and bias.requires_grad:
        _accumulate(bias, gradient.sum([0, *range(2, gradient.dim())]))


def _of(module: Any, name: str) -> Callable[..., Tensor]:
    """Return torch's function for a convolution in as many dimensions, or for one of its gradients."""
    dimensions = module.weight.dim() - 2
    found: Callable[..., Tensor] = getattr(convolution if name else F, f"conv{dimensions}d{name}")
    return found


def _settings(module: Any) -> tuple[Any, ...]:
    return module.stride, module.padding, module.dilation, module.groups


def _embedding(deferred: DeferredGradients, module: nn.Embedding, x: Tensor) -> Tensor:
    if module.max_norm is not None or not _can_be_noted(module, x):  # it would change the weight in place
        return nn.Embedding.forward(module, x)

    def look_up(x: Tensor, weight: Tensor = module.weight) -> Tensor:
        kinds = module.padding_idx, None, module.norm_type, module.scale_grad_by_freq, module.sparse
        return F.embedding(x, weight, *kinds)

    def accumulate(parameters: tuple[Tensor, Tensor | None], gradient: Tensor, x: Tensor) -> None:
        with torch.enable_grad():  # torch knows how, with all settings, and looking up costs little
            look_up(x, parameters[0]).backward(gradient)

    noted = _Noted(deferred, (module.weight, None), accumulate)
    y: Tensor = _Embedding.apply(x, noted.anchor(module.weight.device), noted, look_up)  # type: ignore[no-untyped-call]
    return y


_REPLACED: dict[type, Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
}


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.requires_grad:  # on a leaf, this accumulates and calls its hooks
        parameter.backward(gradient.to(parameter.dtype))


def _can_be_noted(module: Any, x: Any) -> bool:
    """Return whether the parameters of a module, and what it gets, are of the kind whose gradients are known here."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    plain = [type(p) is nn.Parameter and p.is_leaf for p in (weight, bias) if p is not None]
    numbers = weight is not None and weight.is_floating_point() and not x.is_complex() and not x.is_nested
    strided = x.layout == torch.strided
    return bool(plain) and all(plain) and numbers and strided and bool(weight.requires_grad)


def _cast(deferred: DeferredGradients, module: Any, x: Tensor) -> tuple[Tensor, _Hidden, _Hidden]:
    """Return the input, the weight and the bias in the data type in which autocast would compute."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def cast(tensor: Tensor) -> Tensor:
        eligible = dtype is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor if not eligible else tensor.to(dtype)

    def cast_parameter(parameter: Tensor | None) -> _Hidden:
        if parameter is None:
            return _Hidden(None)
        eligible = dtype is not None and parameter.dtype != torch.float64
        return _Hidden(deferred.cast(parameter, dtype) if eligible and dtype is not None else parameter.detach())

    return cast(x), cast_parameter(module.weight), cast_parameter(module.bias)
