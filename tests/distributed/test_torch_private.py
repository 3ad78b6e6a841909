"""What is private in torch is there, and does what is relied on."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_hetero.distributed.torch_private import (
    CONVERT,
    FOREACH_MAX,
    FOREACH_NORM,
    LOADER_ITERATOR,
    UNSCALE,
    BatchNorm,
    collective_methods,
    computes_in_buckets,
    copies_combined,
    current_backward_pass,
    default_store,
    functional_resolvers,
    has_hooks,
    hooks_of_module,
    is_held_elsewhere,
    is_without_memory,
    memory_of,
    node_before_ddp,
    node_of_base,
    norms_of,
    queue_after_all_reduce,
    queue_after_backward,
    reduces_after_backward,
    running_function,
    sleep_on_device,
    source_of_cast,
    tensor_without_memory,
    unscale,
    version_of,
    without_tensor_hooks,
    without_torch_function,
    wrapper_of,
)


def test_callbacks_run_after_the_backward_pass_in_the_order_of_queueing() -> None:
    x, seen = torch.ones(2, requires_grad=True), []
    y = x * 2

    def queue(gradient: torch.Tensor) -> None:
        seen.append("hook")
        queue_after_backward(lambda: seen.append("first"))
        queue_after_backward(lambda: seen.append("second"))

    y.register_hook(queue)
    x.register_hook(lambda gradient: seen.append("leaf"))
    y.sum().backward()
    assert seen == ["hook", "leaf", "first", "second"]


def test_nested_backward_passes_have_numbers_of_their_own() -> None:
    numbers: list[int] = []

    def inner(gradient: torch.Tensor) -> None:
        numbers.append(current_backward_pass())
        with torch.enable_grad():
            z = torch.ones(1, requires_grad=True)
            w = z * 3
            w.register_hook(lambda g: numbers.append(current_backward_pass()))
            w.backward()

    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(inner)
    y.backward()
    assert current_backward_pass() == -1
    assert len(set(numbers)) == 2
    assert -1 not in numbers


class Seen(torch.autograd.Function):
    """Notes which functions run, in both passes."""

    found: ClassVar[list[Any]] = []

    @staticmethod
    def note() -> None:
        frame: Any = sys._getframe()
        while frame is not None:
            if (function := running_function(frame)) is not None:
                Seen.found.append(function)
            frame = frame.f_back

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        Seen.note()
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        Seen.note()
        return slopes


def test_the_function_that_runs_is_known_in_both_passes() -> None:
    """Otherwise collectives of the user's own synchronised layers are taken for others, and the shares stay equal."""
    Seen.found.clear()
    Seen.apply(torch.ones(1, requires_grad=True)).sum().backward()  # type: ignore[no-untyped-call]
    assert Seen.found == [Seen, Seen]
    Seen.note()
    assert len(Seen.found) == 2


def test_a_change_in_place_shows() -> None:
    tensor = torch.zeros(1)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) > before


def test_memory_has_a_number_also_without_an_address() -> None:
    tensor, other = torch.empty(4, 4, device="meta"), torch.empty(4, 4, device="meta")
    assert memory_of(tensor) == memory_of(tensor[1].t().view(2, 2))
    assert memory_of(tensor) != memory_of(other)


def test_hooks_are_silent_for_a_while() -> None:
    seen: list[str] = []
    parameter = nn.Parameter(torch.ones(1))
    parameter.register_hook(lambda g: seen.append("user"))
    with without_tensor_hooks([parameter]):
        parameter.sum().backward()
        assert seen == []
    parameter.sum().backward()
    assert seen == ["user"]


def test_batch_normalisation_has_one_base() -> None:
    layers = [nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.BatchNorm3d(1), nn.SyncBatchNorm(1)]
    assert all(isinstance(layer, BatchNorm) for layer in layers)


def test_a_loader_keeps_its_workers_where_a_copy_looks() -> None:
    loader: DataLoader[int] = DataLoader(range(2), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    assert vars(loader)[LOADER_ITERATOR] is None
    list(loader)
    assert vars(loader)[LOADER_ITERATOR] is not None


def copied_outputs() -> list[bool]:
    """Return whether DDP copies its output, and whether the original is found, with and without a search."""
    found = []
    for search in (False, True):
        made: list[torch.Tensor] = []
        layer = nn.Linear(1, 1)
        layer.register_forward_hook(lambda module, inputs, output, made=made: made.append(output))
        ddp = DistributedDataParallel(layer, find_unused_parameters=search)
        output = ddp(torch.ones(1, 1))
        found += [output.grad_fn is not made[0].grad_fn, node_before_ddp(output) is made[0].grad_fn]
        output.sum().backward()
    return found


def test_an_output_of_ddp_is_recognised(ranks: RankPools) -> None:
    assert ranks.run(2, copied_outputs) == [[False, True, True, True]] * 2
    assert node_before_ddp(torch.ones(1)) is None


def on_ranks() -> tuple[bool, bool, list[float]]:
    """Return whether there is a store, whether DDP says when it reduces, and gradients that it reduced when told."""
    store = default_store()
    store.set("test_torch_private", "there")
    ddp = DistributedDataParallel(nn.Linear(1, 1, bias=False), static_graph=True)
    late = reduces_after_backward(ddp)
    weight = ddp.module.weight
    value = torch.full((1, 1), float(dist.get_rank()))
    ddp(torch.ones(1, 1))  # begins a step
    handle = weight.register_hook(lambda gradient: queue_after_all_reduce(ddp))
    torch.autograd.backward([weight], [value])
    handle.remove()
    assert weight.grad is not None
    return bool(store.check(["test_torch_private"])), late, weight.grad.flatten().tolist()


def test_the_store_and_the_first_step_of_a_static_graph(ranks: RankPools) -> None:
    assert default_store() is None
    assert ranks.run(2, on_ranks) == [(True, True, [0.5])] * 2


def test_collectives_pass_where_they_are_watched() -> None:
    """tests/plugin/ddp/test_own_collectives.py shows that they do; here are the names."""
    assert {"allreduce", "allgather", "broadcast", "reduce_scatter", "alltoall", "send", "recv"} <= {
        *collective_methods()
    }
    functional, resolvers = functional_resolvers()
    assert resolvers
    assert all(getattr(functional, name) is resolver for name, resolver in resolvers.items())


@pytest.mark.parametrize("view", [False, True])
def test_what_ddp_does_with_combined_gradients(ranks: RankPools, view: bool) -> None:
    expected = [(not view, False), (not view, view), (not view, view)]
    assert ranks.run(1, combined_by_hooks, view) == [expected]


def combined_by_hooks(view: bool) -> list[tuple[bool, bool]]:
    facts = []
    for hook in ("none", "Python", "C++"):
        ddp = DistributedDataParallel(nn.Linear(2, 2), gradient_as_bucket_view=view)
        if hook == "Python":
            ddp.register_comm_hook(None, allreduce_hook)
        elif hook == "C++":
            ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)  # type: ignore[attr-defined]
        facts.append((copies_combined(ddp), computes_in_buckets(ddp)))
        if not view:
            ddp(torch.ones(1, 2)).sum().backward()
            assert ddp.module.weight.grad is not None
            assert version_of(ddp.module.weight.grad) > 0
        with ddp.no_sync():
            assert not copies_combined(ddp)
            assert not computes_in_buckets(ddp)
    assert (copies_combined(ddp.module), computes_in_buckets(ddp.module)) == (False, False)
    return facts


def test_a_device_can_be_kept_busy() -> None:
    """Without a device only the name can be tested: torch refuses before it looks at the number of cycles."""
    if torch.cuda.is_available():
        sleep_on_device(1000)
        torch.cuda.synchronize()
    else:
        with pytest.raises((AttributeError, AssertionError, RuntimeError), match=r"not linked|NVIDIA|CUDA|_cuda_sleep"):
            sleep_on_device(1000)


def test_hooks_on_gradients_are_seen() -> None:
    plain, hooked, accumulating = (nn.Parameter(torch.ones(2)) for _ in range(3))
    handle = hooked.register_hook(lambda gradient: gradient * 2)
    accumulating.register_post_accumulate_grad_hook(lambda parameter: None)
    assert [has_hooks(parameter) for parameter in (plain, hooked, accumulating)] == [False, True, True]
    handle.remove()
    assert not has_hooks(hooked)


def test_hooks_on_modules_are_seen() -> None:
    module, hooks = nn.Linear(2, 2), [lambda *_, n=n: None for n in range(4)]
    module.register_forward_pre_hook(hooks[0])
    module.register_forward_hook(hooks[1])
    module.register_full_backward_pre_hook(hooks[2])
    module.register_full_backward_hook(hooks[3])
    assert hooks_of_module(module) == hooks


def test_a_tensor_without_memory_says_where_it_is_and_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which torch sets for them
    tensor = tensor_without_memory((2, 3), torch.float32, torch.device("cpu"))
    assert (tuple(tensor.shape), tensor.dtype, tensor.device.type) == ((2, 3), torch.float32, "cpu")
    mixed = tensor @ torch.ones(3, 4) + 1
    assert tuple(mixed.shape) == (2, 4)
    assert is_without_memory(mixed)
    assert not is_without_memory(torch.ones(3, device=mixed.device))


class Named(torch.Tensor):
    """Keeps the operators that it is asked for, and has no memory."""

    asked: ClassVar[list[Any]] = []

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        cls.asked.append(func.overloadpacket)
        if func.overloadpacket is UNSCALE:
            return None
        return [torch.ones(())] if func.overloadpacket in (FOREACH_NORM, FOREACH_MAX) else torch.ones(2, 3)


def test_a_tensor_without_memory_answers_the_operators_of_clipping_and_scalers() -> None:
    made = wrapper_of(Named, (2, 3), torch.ones(4, dtype=torch.float64))
    assert (type(made), made.shape, made.dtype, made.dim()) == (Named, (2, 3), torch.float64, 2)
    made.float()
    torch._foreach_norm([made])
    torch._foreach_max([made])
    unscale([made], torch.zeros(()), torch.ones(()))
    assert Named.asked == [CONVERT, FOREACH_NORM, FOREACH_MAX, UNSCALE]


def test_norms_and_unscaling_of_plain_tensors() -> None:
    gradients, found = [torch.full((4,), 2.0), torch.tensor([3.0, float("inf")])], torch.zeros(())
    assert [float(norm) for norm in norms_of(gradients[:1])] == [4.0]
    unscale(gradients[:1], found, torch.tensor(0.5))
    assert (gradients[0].tolist(), float(found)) == ([1.0] * 4, 0.0)
    unscale(gradients, found, torch.tensor(0.5))
    assert float(found) == 1.0


class Shy(nn.Parameter):
    """Answers nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("asked")


def test_a_parameter_changes_its_class_and_can_be_asked_past_it() -> None:
    parameter = nn.Parameter(torch.ones(2))
    loss = (parameter * 2).sum()
    parameter.__class__ = Shy  # it stays the leaf of the graph
    with pytest.raises(RuntimeError, match="asked"):
        _ = parameter.grad
    with without_torch_function():
        loss.backward()
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [2.0, 2.0]
    parameter.__class__ = nn.Parameter
    assert parameter.sum().item() == 2.0


def test_the_leaf_of_what_autocast_saves_is_known() -> None:
    layer = nn.Linear(3, 4)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        source = source_of_cast(tensor)
        if source is not None:
            found.append(source)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(2, 3, requires_grad=True)).sum()
    ((cast, leaf),) = [pair for pair in found if pair[1] is layer.weight]
    assert cast.dtype == torch.bfloat16
    assert cast.shape == leaf.shape


def test_the_base_of_a_view_is_reached_after_a_change_in_place() -> None:
    x, seen = torch.ones(2, 3, 3, requires_grad=True), []
    y = nn.Linear(3, 3)(x)
    node = node_of_base(y)
    y.register_hook(lambda _: seen.append("the view"))  # lost
    node.register_prehook(lambda _: seen.append("base"))
    y += 1
    y.sum().backward()
    assert seen == ["base"]
    assert node_of_base(torch.ones(2, requires_grad=True) * 2) is None


def test_what_cannot_be_swapped_is_known_in_advance() -> None:
    free, in_graph, frozen = (nn.Parameter(torch.ones(2), requires_grad) for requires_grad in (True, True, False))
    kept = in_graph * 2  # a node that accumulates gradients can stay
    assert not any(map(is_held_elsewhere, (free, in_graph, frozen)))
    for parameter in (free, in_graph, frozen):
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.zeros(2), parameter.requires_grad))
    held = nn.Parameter(torch.ones(2))
    product = held.square()  # the node keeps the tensor itself
    assert is_held_elsewhere(held)
    with pytest.raises(RuntimeError, match="use_count"):
        torch.utils.swap_tensors(held, nn.Parameter(torch.zeros(2)))
    del kept, product
