"""Gradients that are put off are those of a whole backward pass, whatever a layer does; nothing is silently wrong."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from lightning_hetero.distributed.pipeline.passes.deferred import DeferredGradients, put_off_with

D = 8


class Block(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.a, self.b = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(self.n1(x)).chunk(3, -1)
        x = x + self.drop(self.o(F.scaled_dot_product_attention(q, k, v)))
        return x + self.drop(self.b(F.gelu(self.a(self.n2(x)))))


class Doubled(torch.autograd.Function):
    calls: int = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        Doubled.calls += 1
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class Of(nn.Module):
    """A module of parts, with a function that computes with them; counts what hooks do."""

    first: Any
    second: Any

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function
        self.count = 0

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def doubled(x: Tensor, w: Tensor) -> Any:
    return Doubled.apply(x, w)  # type: ignore[no-untyped-call]


def linear(a: int = D, b: int = D, **given: Any) -> nn.Linear:
    return nn.Linear(a, b, **given)


def hooked() -> Any:
    module: Any = Of(lambda m, x: m.second(m.first(x)), first=linear(), second=linear())

    def double(gradient: Tensor) -> Tensor:
        module.count += 1
        return gradient * 2

    def after(_: Tensor) -> None:
        module.count += 10

    module.first.weight.register_hook(double)
    module.first.weight.register_post_accumulate_grad_hook(after)
    return module


def backward_hook() -> Any:
    module: Any = Of(lambda m, x: m.second(m.first(x)), first=linear(), second=linear())
    module.first.register_full_backward_hook(lambda *_: setattr(module, "count", module.count + 1))
    return module


def checkpointed(*, reentrant: bool) -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        def counted(x: Tensor) -> Any:
            m.count += 1
            return m.block(x)

        return checkpoint(counted, x, use_reentrant=reentrant)

    return Of(run, block=Block())


def frozen() -> nn.Module:
    block = Block()
    block.qkv.requires_grad_(False)
    block.a.weight.requires_grad_(False)
    block.b.bias.requires_grad_(False)
    return block


def autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return m.block(x.float()).double()


def compiled() -> nn.Module:
    block = Block()
    return Of(lambda m, x: m.compiled(x), compiled=torch.compile(block, backend="aot_eager"))


def input_gradient_within(m: Any, x: Tensor) -> Any:
    """A layer computes the gradient of something else on its way, as energies do for forces."""
    with torch.enable_grad():
        inner = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(m.first(inner).square().sum(), inner)
    return m.second(x) + force * m.first(x)


def accumulating_within(m: Any, x: Tensor) -> Any:
    """A layer has a backward pass of its own, whose gradients stay on its parameters."""
    m.first(x.detach()).square().sum().backward()
    return m.first(x)


def look_up(m: Any, x: Tensor) -> Any:
    tokens = (x.detach().abs() * 3).long().clamp(max=6)
    return m.table(tokens).sum(-2) + m.first(x)


def tied_embedding(m: Any, x: Tensor) -> Any:
    tokens = (x.detach()[..., 0].abs() * 3).long().clamp(max=6)
    return (m.table(tokens) + x) @ m.table.weight.t()


ZOO: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "no bias": lambda: linear(bias=False),
    "mlp": lambda: nn.Sequential(linear(D, 16), nn.GELU(), nn.LayerNorm(16), linear(16, D)),
    "two blocks": lambda: nn.Sequential(Block(), Block()),
    "dropout": lambda: Block(drop=0.3),
    "a layer used twice": lambda: Of(lambda m, x: m.a(torch.tanh(m.b(torch.tanh(m.a(x))))), a=linear(), b=linear()),
    "a weight and its transpose": lambda: Of(
        lambda m, x: torch.tanh(x @ m.w) @ m.w.t(), w=nn.Parameter(torch.randn(D, D))
    ),
    "a weight used by others": lambda: Of(lambda m, x: m.a(x) @ m.a.weight + m.a.bias, a=linear()),
    "checkpoint": lambda: checkpointed(reentrant=False),
    "reentrant checkpoint": lambda: checkpointed(reentrant=True),
    "custom function": lambda: Of(lambda m, x: m.a(doubled(x, m.w)), a=linear(), w=nn.Parameter(torch.randn(D, D))),
    "in place": lambda: Of(lambda m, x: m.b(m.r(m.a(x))), a=linear(), b=linear(), r=nn.ReLU(inplace=True)),
    "a view as output": lambda: Of(lambda m, x: m.a(x)[:, 1:].transpose(1, 2), a=linear()),
    "unused parameters": lambda: Of(lambda m, x: m.a(x), a=linear(), unused=linear()),
    "parameters joined late": lambda: Of(
        lambda m, x: m.a(x) + m.s(torch.tanh(m.p)), a=linear(), s=linear(), p=nn.Parameter(torch.randn(1, 5, D))
    ),
    "the input is ignored": lambda: Of(lambda m, x: m.p * 2, p=nn.Parameter(torch.randn(2, 5, D))),
    "two outputs": lambda: Of(lambda m, x: (h := torch.tanh(m.a(x)), m.b(h)), a=linear(), b=linear()),
    "multi-head attention": lambda: Of(
        lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(D, 2, batch_first=True)
    ),
    "lstm": lambda: Of(lambda m, x: m.a(x)[0], a=nn.LSTM(D, D, batch_first=True)),
    "hooks on a parameter": hooked,
    "full backward hook": backward_hook,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(linear()),
    "spectral norm": lambda: nn.utils.spectral_norm(linear()),
    "convolutions and batch norm": lambda: nn.Sequential(
        nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Conv1d(5, 5, 1, bias=False)
    ),
    "autocast": lambda: Of(autocast, block=Block().float()),
    "some are frozen": frozen,
    "compiled": compiled,
    "transformer layer": lambda: nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True, norm_first=True),
    "convolution in two dimensions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv2d(1, 4, 3, stride=2, padding=(2, 1), dilation=(1, 2)),
        nn.Conv2d(4, 4, 2, groups=2),
    ),
    "convolution in three dimensions": lambda: nn.Sequential(nn.Unflatten(1, (1, 1, 5)), nn.Conv3d(1, 2, (1, 2, 3))),
    "convolution padded as it is": lambda: nn.Sequential(
        nn.Conv1d(5, 5, 3, padding="same"), nn.Conv1d(5, 5, 3, padding=1, padding_mode="circular")
    ),
    "convolution without batch": lambda: Of(lambda m, x: m.a(x[0])[None], a=nn.Conv1d(5, 5, 3)),
    "linear on one sample": lambda: Of(lambda m, x: m.a(x[0, 0]), a=linear()),
    "embedding": lambda: Of(look_up, table=nn.Embedding(7, D, padding_idx=0, scale_grad_by_freq=True), first=linear()),
    "embedding with a largest norm": lambda: Of(look_up, table=nn.Embedding(7, D, max_norm=0.5), first=linear()),
    "sparse embedding": lambda: Of(look_up, table=nn.Embedding(7, D, sparse=True), first=linear()),
    "tied embedding": lambda: Of(tied_embedding, table=nn.Embedding(7, D)),
    "a gradient of something else": lambda: Of(input_gradient_within, first=linear(), second=linear()),
    "a backward pass within": lambda: Of(accumulating_within, first=linear()),
    "complex numbers": lambda: Of(lambda m, x: m.a(x.to(torch.complex128)).abs(), a=linear(dtype=torch.complex128)),
    "nested loops of views": lambda: Of(lambda m, x: m.a(x.transpose(0, 1)).mul_(2).transpose(0, 1), a=linear()),
}


def gradients(make: Callable[[], nn.Module], *, put_off: bool, as_loss: bool) -> tuple[dict[str, Tensor | None], Any]:
    """Return all gradients of two micro-batches, whose backward passes are split, and what hooks have counted."""
    torch.manual_seed(0)
    Doubled.calls = 0
    module = make()
    module.train()
    deferred = DeferredGradients([module] if put_off else [])
    found: dict[str, Tensor | None] = {}
    jobs: list[Any] = []
    with deferred.installed():
        for i in range(2):
            torch.manual_seed(10 + i)
            x = torch.randn(2, 5, D).requires_grad_()
            output = module(x)
            outputs = output if isinstance(output, tuple) else (output,)
            given = [torch.randn_like(o) for o in outputs]
            with deferred.put_off() as noted:
                if as_loss:
                    sum((o * g).sum() for o, g in zip(outputs, given, strict=True)).backward()
                else:
                    torch.autograd.backward(outputs, given)
            jobs += noted
            found[f"input {i}"] = x.grad
        for job in jobs:
            job()
    found |= {name: p.grad for name, p in module.named_parameters()}
    return found, (getattr(module, "count", 0), Doubled.calls, len(jobs))


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> Any:
    # torch sets it where something is compiled, and older versions write there
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("as_loss", [False, True], ids=["output", "loss"])
@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_those_of_a_whole_backward_pass(name: str, as_loss: bool) -> None:
    expected, (count, calls, _) = gradients(ZOO[name], put_off=False, as_loss=as_loss)
    found, (found_count, found_calls, _) = gradients(ZOO[name], put_off=True, as_loss=as_loss)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        other = found[key]
        assert (value is None) == (other is None), key
        if value is not None and other is not None:
            assert value.layout == other.layout
            assert value.dtype == other.dtype
            torch.testing.assert_close(other.to_dense(), value.to_dense(), rtol=1e-10, atol=1e-10, msg=key)
    assert (found_count, found_calls) == (count, calls)


@pytest.mark.parametrize(
    ("name", "expected"), [("mlp", 4), ("two blocks", 16), ("convolutions and batch norm", 4), ("tied embedding", 2)]
)
def test_weights_are_really_put_off(name: str, expected: int) -> None:
    assert gradients(ZOO[name], put_off=True, as_loss=True)[1][2] == expected


def test_an_input_that_changes_before_its_use_is_an_error() -> None:
    module, x = linear(), torch.randn(2, D)
    deferred = DeferredGradients([module])
    with deferred.installed():
        with deferred.put_off() as jobs:
            module(x).sum().backward()
        x.add_(1)
        with pytest.raises(RuntimeError, match="changed in place after its backward pass"):
            jobs[0]()


def test_second_derivatives_are_refused_not_wrong() -> None:
    module, x = linear(), torch.randn(2, D, requires_grad=True)
    with DeferredGradients([module]).installed():
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_modules_are_as_before() -> None:
    module = Block()
    before = {name: dict(vars(part)) for name, part in module.named_modules()}
    with DeferredGradients([module, module]).installed():
        assert "forward" in vars(module.qkv)
    assert {name: dict(vars(part)) for name, part in module.named_modules()} == before
    assert copy.deepcopy(module).qkv.forward.__func__ is nn.Linear.forward  # type: ignore[attr-defined]


def test_without_gradients_layers_are_their_own() -> None:
    module, x = linear(), torch.randn(2, D)
    with DeferredGradients([module]).installed(), torch.no_grad():
        assert module(x).grad_fn is None
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=0, atol=0)


def test_what_belongs_to_a_layer_can_be_put_off_with_it() -> None:
    module, other, done = linear(), nn.LayerNorm(D), list[int]()
    assert not put_off_with(module, lambda: done.append(0)), "in no backward pass"
    deferred = DeferredGradients([module, other])
    with deferred.installed(), deferred.put_off() as jobs:
        assert put_off_with(module, lambda: done.append(1))
        assert not put_off_with(other, lambda: done.append(2)), "a layer that runs whole"
        module.requires_grad_(False)
        assert not put_off_with(module, lambda: done.append(3))
    assert not done
    for job in jobs:
        job()
    assert done == [1]


def test_autocast_casts_a_weight_once_for_all_micro_batches() -> None:
    module = linear().float()
    deferred = DeferredGradients([module])
    with deferred.installed(), torch.autocast("cpu", torch.bfloat16):
        saved = [module(torch.randn(2, D).float()) for _ in range(3)]
        kept = {id(one) for _, one in deferred._casts.values()}
        assert len(kept) == 2, "weight and bias"
        assert {y.dtype for y in saved} == {torch.bfloat16}
        with torch.no_grad():
            module.weight.add_(1.0)
        assert not torch.equal(module(torch.ones(1, D).float()), saved[0])
    assert not deferred._casts
