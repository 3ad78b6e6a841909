"""Split any model: each stage runs the model's own forward pass, and leaves out the layers of other stages.

What a model computes between its layers, such as masks and positions, then is what the model computes, on every stage.
A layer of an earlier stage returns a tensor without memory there, which has the shape and the device of the output; the
last of them returns what the stage before has sent.  The pass ends after the last layer of the stage.  A model can be
split like this if its layers are called in order, each once, and if each needs of the earlier ones only the output of
the one before it.  That is verified with tensors without memory before the first step, on all ranks alike.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call

from lightning_hetero.distributed.pipeline.borrowed import state_kept
from lightning_hetero.distributed.pipeline.structure import Call, mapped, tensors_of
from lightning_hetero.distributed.torch_private import is_without_memory, tensor_without_memory
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Replay", "Segment"]

_CHECKPOINTS = torch.utils.checkpoint.__file__
_Handler = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_handlers: list[_Handler | None] = []


class Segment(nn.Module):
    """A layer of a model together with the tensors that every stage needs.

    Args:
        modules: The modules of the layer.
        everywhere: Parameters and buffers that belong to no layer, which the model's own code uses between them.

    Attributes:
        modules_of_layer: The modules of the layer.
    """

    def __init__(self, modules: Sequence[nn.Module], everywhere: Sequence[Tensor]) -> None:
        super().__init__()
        self.modules_of_layer = nn.ModuleList(modules)
        for number, tensor in enumerate(everywhere):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"everywhere_{number}", tensor)
            else:
                self.register_buffer(f"everywhere_{number}", tensor)


class _Ended(BaseException):
    """The last layer of the stage has returned; the code after it must not run."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Replay:
    """The layers of a model that its own forward pass calls.

    Args:
        model: The model.
        layers: Its layers, each as the modules that belong to it, in any order.

    Attributes:
        layers: The layers, each with the tensors that every stage needs; from :meth:`prepare` on in the order of calls.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Sequence[nn.Module]]) -> None:
        self._model = model
        self._modules = [module for layer in layers for module in layer]
        self._layer_of = [number for number, layer in enumerate(layers) for _ in layer]
        self._number_of = {id(module): number for number, module in enumerate(self._modules)}
        of_layers = {id(t) for module in self._modules for t in (*module.parameters(), *module.buffers())}
        everywhere = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in of_layers]
        self.layers: list[nn.Module] = [Segment(layer, everywhere) for layer in layers]
        self._names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._alike: dict[Hashable, int] = {}
        self._kind_of = [self._kind(module) for module in self._modules]
        self._outputs: dict[Hashable, Any] = {}
        self._order: list[int] | None = None

    def prepare(self, call: Call) -> None:
        """Verify that the model can be split between its layers; every rank finds the same.

        The layers are then in the order in which the model calls them.
        """
        if self._order is None:
            self._order = self._verified(call)

    def needs_call(self, numbers: range) -> bool:  # noqa: ARG002
        """Return that every stage needs the arguments of the model."""
        return True

    def run(self, numbers: range, value: Any, call: Call | None) -> Any:
        """Return the output of some consecutive layers, that of the model for the last ones; see ``LayerCalls``."""
        assert call is not None
        self.prepare(call)
        called = self._order or []
        before = [n for n in called if self._layer_of[n] < numbers.start]
        own = [n for n in called if self._layer_of[n] in numbers]
        is_last = numbers.stop == len(self.layers)
        if not own and not is_last:
            return value
        end = None if is_last else own[-1]
        seen: set[int] = set()

        def handle(layer: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            number = self._number_of[id(layer)]
            if number in seen:  # within a later layer that shares it
                return original(*args, **kwargs)
            seen.add(number)
            if before and number == before[-1]:
                return value
            if self._layer_of[number] < numbers.start:
                return self._without_memory(number, args, kwargs)
            with _calls_handled_by(None):
                output = original(*args, **kwargs)
            if _has_no_memory(output):
                raise self._entangled(number)
            raise _Ended(output)

        swapped = [self._modules[n] for n in (*before, *(() if end is None else (end,)))]
        with _intercepted(swapped, handle):
            try:
                output = self._model.forward(*call.args, **call.kwargs)
            except _Ended as ended:
                return ended.output
        return mapped(output, lambda leaf: None if isinstance(leaf, Tensor) and is_without_memory(leaf) else leaf)

    # ---- what the model does between its layers --------------------------------------------------------------------

    def _verified(self, call: Call) -> list[int]:
        """Return the numbers of the layers in the order in which the model calls them.

        Raises:
            UnsupportedFeatureError: The model cannot be split between its layers.
        """
        called: list[int] = []
        checkpoints: list[Any] = []
        with torch.no_grad(), torch.random.fork_rng([]), state_kept(self._model):

            def note(layer: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG001
                called.append(self._number_of[id(layer)])
                checkpoints.append(_checkpoint_around())
                return self._without_memory(called[-1], args, kwargs)

            with _intercepted(self._modules, note):
                self._model.forward(*call.args, **call.kwargs)
            called = self._ordered(called)
            layers = [self._layer_of[number] for number in called]
            if len(set(called)) < len(called) or layers != sorted(layers):
                number = next(
                    n for i, n in enumerate(called) if n in called[:i] or self._layer_of[n] < max([0, *layers[:i]])
                )
                raise UnsupportedFeatureError(
                    f"`hetero_pipeline` needs the model to call each of its layers once, got another call of"
                    f" {self._name(number)!r} after later layers. {_WAY_OUT}"
                )
            for i in range(1, len(called)):
                if layers[i] == layers[i - 1]:
                    continue
                if checkpoints[i] is not None and checkpoints[i] is checkpoints[i - 1]:
                    raise UnsupportedFeatureError(
                        f"`hetero_pipeline` cannot separate layers that one `torch.utils.checkpoint` contains, got"
                        f" {self._name(called[i - 1])!r} and {self._name(called[i])!r}. Checkpoint each layer by"
                        f" itself, or name them as one with `lightning_hetero.register_layers`."
                    )
                self._verify_cut(call, called[:i], called[i:])
        return called

    def _ordered(self, called: Sequence[int]) -> list[int]:
        """Change to the order in which the layers are called; return the new numbers of the modules that are called."""
        firsts = {self._layer_of[number]: i for i, number in reversed(list(enumerate(called)))}
        keys: list[tuple[int, int]] = []
        for layer in range(len(self.layers)):  # one that is not called keeps its place after the one before it
            keys.append((firsts.get(layer, keys[-1][0] if keys else 0), layer))
        order = [layer for _, layer in sorted(keys)]
        modules = [self._modules[n] for layer in order for n in range(len(self._modules)) if self._layer_of[n] == layer]
        before = self._modules
        kinds = {id(module): kind for module, kind in zip(self._modules, self._kind_of, strict=True)}
        self._layer_of = [new for new, layer in enumerate(order) for _ in range(self._layer_of.count(layer))]
        self.layers[:] = [self.layers[layer] for layer in order]
        self._modules = modules
        self._kind_of = [kinds[id(module)] for module in modules]
        self._number_of = {id(module): number for number, module in enumerate(modules)}
        return [self._number_of[id(before[number])] for number in called]

    def _verify_cut(self, call: Call, before: Sequence[int], after: Sequence[int]) -> None:
        """Verify that the modules in ``after`` need of those before only the output of the last one."""
        first, last = after[0], after[-1]

        def handle(layer: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG001
            number = self._number_of[id(layer)]
            output = self._without_memory(number, args, kwargs)
            if number in before:
                return output if number != before[-1] else mapped(output, _zeros_like)
            if _has_no_memory((args, kwargs)):
                raise self._entangled(number)
            if self._layer_of[number] > self._layer_of[first] or number == last:
                raise _Ended(None)
            return mapped(output, _zeros_like)

        with _intercepted([self._modules[n] for n in (*before, *after)], handle), suppress(_Ended):
            self._model.forward(*call.args, **call.kwargs)

    def _entangled(self, number: int) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            f"`hetero_pipeline` needs each layer to use only the output of the layer before it, but"
            f" {self._name(number)!r} also uses that of an earlier one. {_WAY_OUT}"
        )

    def _name(self, number: int) -> str:
        return self._names.get(id(self._modules[number]), "")

    # ---- outputs of layers that are left out -----------------------------------------------------------------------

    def _without_memory(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a layer would return, as tensors without memory."""
        tensors = tensors_of((args, kwargs))
        key = (self._kind_of[number], _signature((args, kwargs)), self._modules[number].training)
        if key not in self._outputs:
            device = tensors[0].device if tensors else torch.device("cpu")
            with torch.inference_mode(False), torch.no_grad(), _calls_handled_by(None):
                try:
                    output = self._tried(self._modules[number], args, kwargs, device)
                except Exception as error:
                    raise UnsupportedFeatureError(
                        f"`hetero_pipeline` must know the shape of what layer {self._name(number)!r} returns on ranks"
                        f" that do not run it, but that depends on values or fails: {error}. {_WAY_OUT}"
                    ) from error
            self._outputs[key] = mapped(output, lambda leaf: _without_memory_like(leaf, device))
        return self._outputs[key]

    @staticmethod
    def _tried(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Any:
        """Return what a layer returns whose parameters have no memory."""
        named = (
            *layer.named_parameters(remove_duplicate=False),
            *layer.named_buffers(remove_duplicate=False),
        )
        logger = logging.getLogger("torch._subclasses.fake_tensor")  # it reports what is handled here
        was_disabled, logger.disabled = logger.disabled, True
        state = {name: tensor_without_memory(tensor.shape, tensor.dtype, device) for name, tensor in named}
        try:
            with state_kept(layer):
                return functional_call(layer, state, args, kwargs, tie_weights=False)
        except Exception:
            # what depends on values, such as routing to experts, mostly keeps the shape
            floating = [t for t in tensors_of((args, kwargs)) if t.is_floating_point()]
            if not floating:
                raise
            return floating[0]
        finally:
            logger.disabled = was_disabled

    def _kind(self, layer: nn.Module) -> int:
        """Return a number that layers share whose outputs have the same shapes for the same inputs."""
        state = (*layer.named_parameters(), *layer.named_buffers())
        key = (type(layer), tuple((name, tuple(t.shape), t.dtype) for name, t in state), repr(layer))
        return self._alike.setdefault(key, len(self._alike))


_WAY_OUT = (
    "Name the layers with `lightning_hetero.register_layers`, with everything in between in one of them, or define"
    " `pipeline_layers()`."
)


@contextmanager
def _intercepted(layers: Sequence[nn.Module], handler: _Handler) -> Iterator[None]:
    """Have ``handler`` called instead of the layers in this context.

    ``forward`` is not enough: layers that are checkpointed call it inside of the checkpoint, where an output has no
    graph, and which must not be left by an exception.
    """
    before = [(layer, type(layer)) for layer in layers]
    with _calls_handled_by(handler):
        try:
            for layer, kind in before:
                layer.__class__ = _intercepting(kind)  # type: ignore[arg-type]
            yield
        finally:
            for layer, kind in before:
                layer.__class__ = kind


@contextmanager
def _calls_handled_by(handler: _Handler | None) -> Iterator[None]:
    _handlers.append(handler)
    try:
        yield
    finally:
        _handlers.pop()


@cache
def _intercepting(kind: type[nn.Module]) -> Any:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def original(*args: Any, **kwargs: Any) -> Any:
            return kind.__call__(self, *args, **kwargs)

        handler = _handlers[-1]
        return original(*args, **kwargs) if handler is None else handler(self, original, args, kwargs)

    made = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__})
    # Classes of transformers wrap the `forward` of each class that derives from them, to checkpoint it.
    if "forward" in vars(made):
        delattr(made, "forward")
    return made


def _checkpoint_around() -> Any:
    """Return the frame of the outermost checkpoint that is being computed; None without one."""
    found, frame = None, inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINTS:
            found = frame
        frame = frame.f_back
    return found


def _signature(value: Any) -> Hashable:
    found: list[Hashable] = []

    def note(leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            found.append((tuple(leaf.shape), leaf.dtype))
        else:
            plain = isinstance(leaf, bool | int | float | str | None)
            found.append(leaf if plain else type(leaf).__qualname__)

    mapped(value, note)
    return tuple(found)


def _has_no_memory(value: Any) -> bool:
    return any(is_without_memory(tensor) for tensor in tensors_of(value))


def _without_memory_like(leaf: Any, device: torch.device) -> Any:
    return tensor_without_memory(leaf.shape, leaf.dtype, device) if isinstance(leaf, Tensor) else leaf


def _zeros_like(leaf: Any) -> Any:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, Tensor) else leaf
