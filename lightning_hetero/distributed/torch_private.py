"""All private names of torch that this package uses, each with the reason why.

tests/distributed/test_torch_private.py fails if torch changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives

__all__ = [
    "CONVERT",
    "FOREACH_MAX",
    "FOREACH_NORM",
    "LOADER_ITERATOR",
    "UNSCALE",
    "BatchNorm",
    "collective_methods",
    "computes_in_buckets",
    "copies_combined",
    "current_backward_pass",
    "default_store",
    "functional_resolvers",
    "has_hooks",
    "hooks_of_module",
    "is_held_elsewhere",
    "is_without_memory",
    "memory_of",
    "node_before_ddp",
    "node_of_base",
    "norms_of",
    "queue_after_all_reduce",
    "queue_after_backward",
    "reduces_after_backward",
    "running_function",
    "sleep_on_device",
    "source_of_cast",
    "tensor_without_memory",
    "unscale",
    "version_of",
    "without_tensor_hooks",
    "without_torch_function",
    "wrapper_of",
]

# The base of batch normalisation in one, two and three dimensions; the public classes have no other in common.
BatchNorm = nn.modules.batchnorm._BatchNorm

# The operators that conversions, clipping by norm and a GradScaler end in. A tensor in parts must answer them, and
# torch has no public names for them.
CONVERT = torch.ops.aten._to_copy
FOREACH_NORM = torch.ops.aten._foreach_norm
FOREACH_MAX = torch.ops.aten._foreach_max
UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_

# Where a DataLoader keeps its persistent workers: a copy of the loader must not share them.
LOADER_ITERATOR = "_iterator"


def queue_after_backward(callback: Callable[[], None]) -> None:
    """Have autograd call ``callback`` once the current backward pass has computed all gradients.

    Callbacks run in the order in which they were queued. DDP waits for its peers in such a callback, which it queues
    during the pass, so a callback that is queued at the start runs before it. No public hook marks this moment: hooks
    on parameters would run Python code for each parameter.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def current_backward_pass() -> int:
    """Return the number of the backward pass that this thread is running; -1 outside of a backward pass.

    Nested passes, for example of reentrant checkpointing, have numbers of their own. torch's own hooks for multiple
    gradients (``torch.autograd.graph``) use the number to tell passes apart.
    """
    return int(torch._C._current_graph_task_id())


def running_function(frame: FrameType) -> type | None:
    """Return the user's autograd function that ``frame`` runs, in its forward or backward pass; None if it runs none.

    In a backward pass nothing public tells which function's it is, or which layer has called the function.
    """
    if frame.f_code is torch.autograd.Function.apply.__code__:
        return cast("type", frame.f_locals["cls"])
    if frame.f_code is torch.autograd.function.BackwardCFunction.apply.__code__:
        return cast("type", frame.f_locals["self"]._forward_cls)
    return None


def node_of_base(tensor: Tensor) -> Any:
    """Return the node of autograd's graph that computed what ``tensor`` is a view of; None if it is no view.

    A hook on a view is lost if the view is changed in place, and nothing public tells what it is a view of.
    """
    return None if tensor._base is None else tensor._base.grad_fn


def source_of_cast(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a tensor that autocast has made from a leaf, and the leaf, if ``tensor`` is it or a view of it.

    Autograd's graph knows the leaf, and a view its base; nothing public tells either.
    """
    base = tensor if tensor._base is None else tensor._base
    node = base.grad_fn
    if node is None or not node.name().startswith("ToCopyBackward"):
        return None
    leaf = getattr(node.next_functions[0][0], "variable", None)
    return None if leaf is None or leaf.shape != base.shape else (base, leaf)


def memory_of(tensor: Tensor) -> int:
    """Return a number that tensors have in common if they share their memory, also where they have no address.

    Tensors of the meta device have none. The number is valid as long as the tensor lives.
    """
    return int(tensor.untyped_storage()._cdata)


def version_of(tensor: Tensor) -> int:
    """Return a number that grows whenever the tensor is changed in place."""
    return tensor._version


def has_hooks(parameter: Tensor) -> bool:
    """Return whether the user has registered hooks on the gradient of a parameter; nothing public lists them."""
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def hooks_of_module(module: nn.Module) -> list[Any]:
    """Return the hooks on the forward and backward passes of a module; nothing public lists them."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [hook for name in names for hook in getattr(module, name, {}).values()]


def is_held_elsewhere(tensor: Tensor) -> bool:
    """Return whether more than Python and one node of a graph hold a tensor, so that it cannot be swapped.

    ``torch.utils.swap_tensors`` raises an error then, and nothing public tells in advance.
    """
    held: int = cast("Any", tensor)._use_count()
    return held > (2 if tensor.is_leaf and tensor.requires_grad else 1)


@contextmanager
def without_tensor_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Remove the user's hooks from ``tensors`` in this context; publicly, only the owner of a hook can remove it."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def reduces_after_backward(model: Any) -> bool:
    """Return whether DDP combines gradients only after its next backward pass, as in the first of a static graph."""
    return getattr(model, "static_graph", False) and not model._static_graph_delay_allreduce_enqueued


def copies_combined(model: Any) -> bool:
    """Return whether DDP copies what it combines into the gradients, whose versions then change."""
    return _combines(model) and not model.gradient_as_bucket_view


def computes_in_buckets(model: Any) -> bool:
    """Return whether a communication hook computes in the gradients themselves, where nothing tells what it has done.

    DDP's record of itself is the only place that names hooks of Python and hooks of C++.
    """
    return _combines(model) and model.gradient_as_bucket_view and bool(model._get_ddp_logging_data().get("comm_hook"))


def _combines(model: Any) -> bool:
    """Return whether ``model`` is DDP, outside of its ``no_sync``."""
    return isinstance(model, nn.parallel.DistributedDataParallel) and model.require_backward_grad_sync


def node_before_ddp(output: Tensor) -> Any:
    """Return the node of autograd's graph that computed an output of DDP, which DDP may have copied.

    DDP copies outputs with ``static_graph`` and ``find_unused_parameters``, and nothing public tells a copy from what
    it was made from.
    """
    node = output.grad_fn
    if node is not None and "_DDPSink" in node.name():
        return node.next_functions[output.output_nr][0]
    return node


def queue_after_all_reduce(ddp: Any) -> None:
    """Have DDP combine gradients after the current backward pass, as in the first of a static graph."""
    queue_after_backward(ddp.reducer._delay_all_reduce)


def default_store() -> Any:
    """Return the store through which the ranks found each other; None without a process group.

    Collectives cannot be used when a rank is gone.
    """
    return dist.distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None


def collective_methods() -> list[str]:
    """Return the names of the methods of ``ProcessGroup`` in which ranks communicate.

    Whatever Python code calls, ``torch.distributed``, its autograd functions or a library built on them, ends in one of
    these. They are not documented, and their names differ between versions of torch.
    """
    prefixes = ("all", "_all", "reduce", "_reduce", "broadcast", "gather", "scatter", "send", "recv", "barrier")
    return [name for name in vars(dist.ProcessGroup) if name.startswith(prefixes)]


def functional_resolvers() -> tuple[Any, dict[str, Any]]:
    """Return the module of functional collectives, and its functions through which all of them find their group.

    Functional collectives run in C++ and call no method of a process group. torch.compile traces the collectives of
    ``torch.distributed`` as functional ones.
    """
    names = ("_resolve_group", "_resolve_group_name", "_expand_group")
    return _functional_collectives, {name: f for name in names if (f := getattr(_functional_collectives, name, None))}


@cache
def _without_memory() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def tensor_without_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor without memory that says it is on ``device``.

    Tensors on "meta" name that device, and code that makes a mask on the device of a tensor would make it there.
    Operations with such a tensor give another one, and those without run as usual.
    """
    with _without_memory():
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def is_without_memory(tensor: Tensor) -> bool:
    """Return whether a tensor was made by :func:`tensor_without_memory`, or computed with one."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def sleep_on_device(cycles: int) -> None:
    """Launch a kernel that keeps the current CUDA device busy for about this many of its clock's cycles.

    torch's own tests use it. No public operation has a duration that does not depend on the device's speed and load.
    """
    torch.cuda._sleep(cycles)


def wrapper_of(cls: Any, shape: Sequence[int], local: Tensor) -> Any:
    """Return a tensor of a subclass that has a shape but no memory of its own, with the type and device of ``local``.

    A part of a parameter must look like the parameter, and nothing public makes a tensor without its memory.
    """
    return Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)


def norms_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the norm of each tensor, on a device with few kernels for all of them, as torch clips gradients."""
    norms: Sequence[Tensor] = torch._foreach_norm(list(tensors))
    return norms


def unscale(gradients: Sequence[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Unscale gradients, and note whether one of them is not finite, as a GradScaler does."""
    torch._amp_foreach_non_finite_check_and_unscale_(list(gradients), found_inf, inverse_scale)


def without_torch_function() -> AbstractContextManager[None]:
    """Return a context in which tensors of subclasses are themselves, whatever their ``__torch_function__`` does.

    torch's notes on extending it use this name; there is none without an underscore.
    """
    context: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context
