"""An accelerator on which torch computes on this machine: memory of its own, and a host that may not wait for it.

Its tensors are on the device "virtual", and their values are those of a tensor in the host's memory.  So trainings on
it are real and can be compared.  As on a card, tensors of different devices must not meet in an operation.  Whatever
would make the host wait for a card is recorded with the line that did it.

torch lets a backend be written in Python since 2.10; importing this module registers it for the process.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from torch import Tensor
from torch.utils._pytree import tree_any, tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "virtual"

_aten = torch.ops.aten
# operations whose result the host must know, or whose shape depends on values
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
}
# their tensors may be on two devices
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default}
# their indices may be on the host, from which they are copied
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
# operations that make tensors, whose own way is to write to an empty one that grows
_FACTORIES = (
    "arange",
    "arange.start",
    "arange.start_step",
    "linspace",
    "logspace",
    "range",
    "range.step",
    "randperm",
    "randperm.generator",
    "eye",
    "eye.m",
    "tril_indices",
    "triu_indices",
)


class VirtualTensor(Tensor):
    """A tensor on the virtual device; it shares the memory of the tensor on the host from which it is made."""

    @staticmethod
    def __new__(cls, values: Tensor) -> VirtualTensor:
        with torch.inference_mode(False):
            return Tensor._make_subclass(
                cls, values.detach(), False, dispatch_device=True, device_for_backend_keys=torch.device(NAME, 0)
            )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"virtual({_values(self)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        note_wait("tolist")
        return _values(self).tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert virtual:0 device type tensor to numpy")

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                copy: Any = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        note_wait("pickled")
        values = _values(self).clone()
        return (torch.nn.Parameter(values) if isinstance(self, torch.nn.Parameter) else values).__reduce_ex__(protocol)

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)


def values_of(tensor: Tensor) -> Tensor:
    """Return the values of a virtual tensor as a tensor on the host, which shares its memory; no wait is noted."""
    return _values(tensor) if isinstance(tensor, VirtualTensor) else tensor


def _values(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return torch.device(NAME, 0)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)  # outside of inference mode, torch has done it
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    asked = kwargs.get("device")
    target = None if asked is None else torch.device(asked).type
    _check_devices(func, tensors)
    _note(func, args, target)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    if asked is not None and target == NAME:
        kwargs = {**kwargs, "device": "cpu"}
    host_args, host_kwargs = tree_map_only(VirtualTensor, _values, (args, kwargs))
    with torch.inference_mode(False):  # torch cannot make a tensor of a class from one of that mode
        result = func(*host_args, **host_kwargs)
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
        return _with_originals(func, result, host_args, host_kwargs, args, kwargs)
    if target not in (None, NAME):
        return result  # on the host, or without memory
    return tree_map_only(Tensor, VirtualTensor, result)


def _must_fit(tensor: Tensor, values: Tensor, func: Any) -> Tensor:
    if tensor.shape != values.shape:
        raise NotImplementedError(f"{func} changes the shape of a virtual tensor")
    return tensor


def _with_originals(func: Any, result: Any, host_args: Any, host_kwargs: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of an operation that changes its arguments with these arguments themselves in it."""
    before, _ = tree_flatten((args, kwargs))
    on_host, _ = tree_flatten((host_args, host_kwargs))
    originals = {id(h): b for h, b in zip(on_host, before, strict=True) if isinstance(h, Tensor)}
    return tree_map_only(
        Tensor, lambda t: _must_fit(originals[id(t)], t, func) if id(t) in originals else VirtualTensor(t), result
    )


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    if func in _COPIES or func in _INDEXED:
        return
    if any(isinstance(t, VirtualTensor) for t in tensors):
        # a scalar of the host may meet tensors of a card
        strangers = [t for t in tensors if not isinstance(t, VirtualTensor) and t.dim() > 0]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got virtual:0 and"
                f" {strangers[0].device} of shape {tuple(strangers[0].shape)}"
            )


# ---- waits ---------------------------------------------------------------------------------------------------------

_waits: list[str] | None = None


def note_wait(what: str) -> None:
    """Note that the host would wait for a card here."""
    if _waits is not None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        _waits.append(f"{what} in " + " < ".join(f"{f.filename.split('/')[-1]}:{f.lineno}" for f in frames[:-4:-1]))


def _note(func: Any, args: Any, target: str | None) -> None:
    copies_back = func is _aten._to_copy.default and target not in (None, NAME)
    if func in _WAITS:
        note_wait(str(func))
    elif copies_back or (func is _aten.copy_.default and not isinstance(args[0], VirtualTensor)):
        note_wait("copy to the host")
    elif func in _INDEXED and tree_any(lambda i: isinstance(i, Tensor) and i.dtype == torch.bool, args[1]):
        note_wait(f"{func} by a mask")


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collect in this context where the host would wait for a card."""
    global _waits  # noqa: PLW0603
    outer, _waits = _waits, []
    try:
        yield _waits
    finally:
        _waits = outer


# ---- registration --------------------------------------------------------------------------------------------------


class _Module:
    """What torch.get_device_module returns."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 8

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 2**33, 2**34

    # Values are drawn from the host's generator.
    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None:
        note_wait("synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _register() -> torch.library.Library:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> Tensor:
        return VirtualTensor(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return VirtualTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        values_of(target).copy_(values_of(source))
        return target

    for name in _FACTORIES:
        overload: Any = getattr(getattr(_aten, name.split(".")[0]), name.split(".")[1] if "." in name else "default")

        def made(*args: Any, overload: Any = overload, **kwargs: Any) -> Tensor:
            return VirtualTensor(overload(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))

        library.impl(name, made, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")  # torch.tensor(..., device=...) dispatches to no class
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    return library


_LIBRARY = _register()  # what it registers ends with it
DEVICE = torch.device(NAME, 0)


class VirtualAccelerator(Accelerator):
    """As many virtual devices as ranks."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [DEVICE] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}
