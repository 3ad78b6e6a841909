"""A layer is shared only if it makes no difference on which ranks its micro-batches run; its copies stay equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_hetero.distributed.pipeline.passes.copies import Copies
from lightning_hetero.distributed.pipeline.passes.sharing import can_be_shared, foreign_hook
from lightning_hetero.testing import SlowLayers

D = 4


class Kept(nn.Module):
    """A layer that does something with what it keeps in each forward pass."""

    def __init__(self, what: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.what = what
        self.number, self.values, self.nested, self.table = 0, [1, 2], {"a": {"b": [0]}}, torch.zeros(D)
        self.any: Any = Box()

    def forward(self, x: Tensor) -> Tensor:
        self.what(self, x)
        y: Tensor = self.inner(x)
        return y


class Box:
    def __init__(self) -> None:
        self.content = 0


def set_(owner: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


def with_hook(register: str, layer: nn.Module, inner: nn.Module) -> nn.Module:
    getattr(inner, register)(lambda *_: None)
    return layer


def hooked(register: str) -> nn.Module:
    layer = nn.Sequential(nn.Linear(D, D), nn.ReLU())
    return with_hook(register, layer, layer[0])


CAN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "without parameters": nn.Tanh,
    "frozen": lambda: nn.Linear(D, D).requires_grad_(False),
    "random": lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout()),
    "attention": lambda: nn.TransformerEncoderLayer(D, 2, 8, batch_first=True),
    "normalised": lambda: parametrizations.weight_norm(nn.Linear(D, D)),
    "reads what it keeps": lambda: Kept(lambda self, x: (self.number, self.values[0], self.any.content)),
}
CANNOT: dict[str, Callable[[], nn.Module]] = {
    "running statistics": lambda: nn.BatchNorm1d(D),
    "a buffer": lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, affine=False)),
    "counts": lambda: Kept(lambda self, x: set_(self, number=self.number + 1)),
    "appends": lambda: Kept(lambda self, x: self.values.append(0)),
    "replaces an entry": lambda: Kept(lambda self, x: self.nested["a"]["b"].__setitem__(0, len(x) + self.number)),
    "keeps a tensor": lambda: Kept(lambda self, x: set_(self, table=x.detach())),
    "changes a tensor": lambda: Kept(lambda self, x: self.table.add_(1)),
    "changes an object": lambda: Kept(lambda self, x: set_(self.any, content=self.any.content + 1)),
    "changes its mode": lambda: Kept(lambda self, x: self.inner.train(not self.inner.training)),
    "has a generator": lambda: Kept(lambda self, x: self.any.__setattr__("r", torch.Generator())),
    "cannot be looked into": lambda: Kept(lambda self, x: set_(self, any=(i for i in range(3)))),
    "fails": lambda: Kept(lambda self, x: 1 / 0),
    "forward hook": lambda: hooked("register_forward_hook"),
    "hook before": lambda: hooked("register_forward_pre_hook"),
    "backward hook": lambda: hooked("register_full_backward_hook"),
    "backward hook before": lambda: hooked("register_full_backward_pre_hook"),
}


def tried(layer: nn.Module) -> bool:
    tensors = [*layer.parameters(), *layer.buffers()]
    x = torch.randn(2, 3, D) if isinstance(layer, nn.TransformerEncoderLayer) else torch.randn(3, D)
    found = can_be_shared(layer, lambda: [layer(x.clone().requires_grad_())], tensors)
    assert all(t.grad is None for t in tensors)
    return found


@pytest.mark.parametrize("kind", CAN)
def test_layers_that_can_be_shared(kind: str) -> None:
    assert tried(CAN[kind]())


@pytest.mark.parametrize("kind", CANNOT)
def test_layers_that_are_never_shared(kind: str) -> None:
    assert not tried(CANNOT[kind]())


def test_gradients_that_are_not_dense_are_not_added_up() -> None:
    layer = nn.Embedding(5, D, sparse=True)
    assert not can_be_shared(layer, lambda: [layer(torch.arange(3))], [layer.weight])


def test_hooks_of_the_package_do_not_mind() -> None:
    layer = nn.Linear(D, D)
    layer.register_forward_hook(SlowLayers([1.0, 2.0])._factor_of)  # type: ignore[arg-type]
    assert foreign_hook(layer) is None
    layer.register_forward_hook(tried)  # type: ignore[arg-type]
    assert foreign_hook(layer) == "tried"


# ---- real ranks ----------------------------------------------------------------------------------------------------


def combine(rank_of_device: int) -> tuple[list[Tensor | None], list[tuple[int, ...]], list[Tensor]]:
    rank = dist.get_rank()
    torch.manual_seed(0)
    used, unused, partly = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    double = nn.Parameter(torch.ones(2, dtype=torch.float64))
    image = nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last))
    parameters = [used, unused, frozen, double, partly, image]
    copies = Copies(parameters, (0, 1), None)
    gradients = {
        id(used): used.detach() * (rank + 1),
        id(double): double.detach() / 3,
        id(image): image.detach() * rank,
    }
    if rank:
        gradients[id(partly)] = partly.detach() * 5
    added = {id(p): g for p, g in copies.add_up(copies.tell(gradients)(), gradients)()}
    found = [added.get(id(p)) for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(rank)  # devices that round differently
    copies.send()()
    return found, [image.stride(), added[id(image)].stride()], [p.detach() for p in parameters]


def test_copies_are_added_up_and_stay_equal(ranks: RankPools) -> None:
    for rank, (found, strides, values) in enumerate(ranks.run(2, combine, 0)):
        used, unused, frozen, double, partly, image = found
        assert unused is None, "an optimiser would change a parameter with a gradient of zeros"
        assert frozen is None
        torch.testing.assert_close(used, torch.full((2, 3), 3.0))
        torch.testing.assert_close(double, torch.full((2,), 2 / 3, dtype=torch.float64))
        torch.testing.assert_close(partly, torch.full((3,), 5.0))
        torch.testing.assert_close(image, torch.ones(2, 3, 2, 2), check_stride=False)
        assert strides[0] == strides[1]
        for number, value in enumerate(values):
            assert float(value.min()) == float(value.max()) == (1.0 + rank if number == 2 else 1.0)
