"""Models and modules of the kinds that people write, which shards must train exactly or refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from shard_models import WIDTH, Block, Plain, seeded
from shard_trainings import Module
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.optim import swa_utils

# ---- models ----------------------------------------------------------------------------------------------------------


class Blocks(Plain):
    """Blocks that a function makes."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(3))


class Bounded(Block):
    """Writes its weights in its forward pass: in place, and by another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        self.up.weight.data = torch.renorm(self.up.weight.data, 2, 0, 0.8)
        self.down.weight.data.clamp_(-0.3, 0.3)
        return super().forward(x)


class Counting(Block):
    """Has buffers of several types, which change in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.calls: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("unsaved", torch.zeros(2, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(dim=0))
        self.calls += 1
        return super().forward(x - self.mean)


class OddShapes(Block):
    """Has parameters without a dimension, without an element, and of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.empty.sum()


class Query(nn.Module):
    """Returns its parameter, or a view of it."""

    def __init__(self, is_view: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, WIDTH))
        self.is_view = is_view

    def forward(self) -> Tensor:
        return self.weight[:1] if self.is_view else self.weight


class Queries(Plain):
    """Adds what small units return after other units have been used."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.ModuleList(Query(is_view) for is_view in (True, False, True))

    def inner(self, x: Tensor) -> Tensor:
        queries = [query() for query in self.queries]
        for block, query in zip(self.blocks, queries, strict=True):
            x = block(x + query.mean(dim=0))
        return x


@dataclass
class Hidden:
    """What a block returns."""

    states: Any


class Wrapped(nn.Module):
    """Uses a parameter of its own and returns an object."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)

    def forward(self, hidden: Any) -> Any:
        return Hidden([torch.tanh(getattr(hidden, "states", [hidden])[0] @ self.weight)])


class Objects(Blocks):
    """Blocks that pass objects on."""

    def __init__(self) -> None:
        super().__init__(Wrapped)

    def inner(self, x: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        result: Tensor = x.states[0]
        return result


class Shared(Plain):
    """Blocks and layers that can be reached by several names, and one that is in a list twice."""

    def __init__(self) -> None:
        super().__init__()
        blocks: Any = self.blocks
        self.again = blocks[1]
        self.more = nn.ModuleList([blocks[0], Block(), blocks[0]])
        self.head = blocks[2].up

    def inner(self, x: Tensor) -> Tensor:
        x = self.again(super().inner(x))
        for block in self.more:
            x = block(x)
        result: Tensor = x + self.head(x).mean(dim=1, keepdim=True)
        return result


class Methods(Plain):
    """Uses blocks through other methods than their forward."""

    def inner(self, x: Tensor) -> Tensor:
        blocks: Any = self.blocks
        for block in blocks:
            x = x + block.down(torch.tanh(block.up(block.norm(x))))
        for block in blocks:
            x = block.forward(x)
        return x


class InPlace(Plain):
    """Changes in place what blocks return."""

    def inner(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x += 1
            x = functional.relu_(x)
        return x


class InPlaceViews(Blocks):
    """Changes in place what layers return, which are views: their results have three dimensions."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(WIDTH, WIDTH))

    def inner(self, x: Tensor) -> Tensor:
        x = x[:, None, :].expand(-1, 3, -1)
        for number, block in enumerate(self.blocks):
            y = block(x)
            y += 0.1 * x
            if number:
                y[:, 0] *= 0.5
            x = torch.tanh(y)
        return x.mean(dim=1)


def _with_linear(wrap: Callable[..., Any], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Blocks(lambda: nn.Sequential(wrap(nn.Linear(WIDTH, WIDTH), **options), nn.Tanh()))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": _with_linear(parametrizations.weight_norm),
    "weight norm of hooks": _with_linear(nn.utils.weight_norm),
    "spectral norm": _with_linear(parametrizations.spectral_norm),
    "spectral norm of hooks": _with_linear(nn.utils.spectral_norm),
    "parametrised unit": lambda: Blocks(lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))),
    "bounded weights": lambda: Blocks(Bounded),
    "buffers": lambda: Blocks(Counting),
    "odd shapes": lambda: Blocks(OddShapes),
    "returned parameters": Queries,
    "returned objects": Objects,
    "shared modules": Shared,
    "methods": Methods,
    "in place": InPlace,
    "views in place": InPlaceViews,
    "dropout": lambda: Blocks(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))),
}


# ---- training steps --------------------------------------------------------------------------------------------------


class Step(Module):
    """A training step of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(seeded(Plain))
        self.kind = kind
        net: Any = self.model
        if kind.startswith("teacher"):
            self.teacher: Any = copy.deepcopy(net).requires_grad_(False)
        if kind == "average":
            self.average = swa_utils.AveragedModel(net).requires_grad_(False)
        if kind.startswith("kept"):
            self.kept = list(net.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, x, y = batch
        net: Any = self.model
        with torch.no_grad():
            written: dict[str, list[Any]] = {"kept written": getattr(self, "kept", []), "written": [*self.parameters()]}
            for parameter in written.get(self.kind, []):
                parameter.data.clamp_(-0.3, 0.3)
        loss = functional.mse_loss(self(x), y)
        if self.kind in ("no gradient", "teacher"):
            with torch.no_grad():
                target = (self.teacher if self.kind == "teacher" else self)(x + 0.1)
            return loss + functional.mse_loss(self(x * 0.9), target)
        if self.kind == "saved":
            self.trainer.save_checkpoint("saved.ckpt")
        if self.kind == "adversarial":
            near = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(functional.mse_loss(self(near), y), near)
            return loss + functional.mse_loss(self(x + 0.1 * gradient.sign()), y)
        if self.kind == "of the root":
            return loss + 0.1 * (net.last.weight**2).sum() * net.scale.exp().sum()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        net: Any = self.model
        if self.kind == "average":
            self.average.update_parameters(net)
        if self.kind == "teacher":
            for old, new in zip(self.teacher.parameters(), net.parameters(), strict=True):
                old.data = old.data * 0.9 + new.data * 0.1


class Hooks(Module):
    """Uses the model, and saves it, in hooks, in some steps only."""

    def __init__(self, hooks: list[str]) -> None:
        super().__init__(seeded(Plain))
        self.seen: list[float] = []
        self.hooks = hooks
        for name in hooks:
            setattr(self, name, self._doing(getattr(self, name)))

    def _doing(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.global_step % 3 != 1:
                net: Any = self.model
                with torch.no_grad():
                    self.seen.append(float(self(torch.ones(2, 5, dtype=torch.float64, device=self.device)).sum()))
                    self.seen.append(
                        float(net.blocks[1](torch.ones(2, WIDTH, dtype=torch.float64, device=self.device)).sum())
                    )
                self.trainer.save_checkpoint("hooks.ckpt")
                dist.barrier()
                state = torch.load("hooks.ckpt", weights_only=False)["state_dict"]
                self.seen.append(float(sum(value.double().sum() for value in state.values())))
                dist.barrier()
            return hook(*args, **kwargs)

        return run


HOOKS = [
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_epoch_end",
    "on_train_epoch_end",
    "on_train_end",
]


class ManualSteps(Module):
    """Optimises by itself in some way."""

    def __init__(self, kind: str) -> None:
        super().__init__(seeded(Plain))
        self.automatic_optimization = False
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> None:
        _, x, y = batch
        optimizers: Any = self.optimizers()
        before = list(self.parameters())

        def step(*losses: Tensor) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            for loss in losses:
                self.manual_backward(loss, retain_graph=loss is not losses[-1])

        if self.kind == "two losses":
            out = self(x)
            step(functional.mse_loss(out, y), out.pow(2).mean())
        elif self.kind == "sometimes two steps" and batch_idx % 2:
            step(functional.mse_loss(self(x), y))
            for optimizer in optimizers:
                optimizer.step()
            step(functional.mse_loss(self(x), y))
        elif self.kind == "sharpness-aware":
            step(functional.mse_loss(self(x), y))
            norm = torch.stack([p.grad.norm() for p in before if p.grad is not None]).norm()
            moves = [p.grad * (0.05 / norm) for p in before if p.grad is not None]
            with torch.no_grad():
                for parameter, move in zip(before, moves, strict=True):
                    parameter.add_(move)
            step(functional.mse_loss(self(x), y))
            with torch.no_grad():
                for parameter, move in zip(before, moves, strict=True):
                    parameter.sub_(move)
        else:
            step(functional.mse_loss(self(x), y))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = [p for name, p in self.named_parameters() if "blocks" in name]
        second = [p for name, p in self.named_parameters() if "blocks" not in name]
        return [torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.AdamW(second, lr=0.01)]


class Lion(torch.optim.Optimizer):
    """Moves by the sign of a mean of gradients."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * 0.1)
                    p.add_((mean * 0.9 + p.grad * 0.1).sign_(), alpha=-group["lr"])
                    mean.mul_(0.99).add_(p.grad, alpha=0.01)
        return loss


class WithLion(Module):
    """Is trained with an optimiser of the user's."""

    def configure_optimizers(self) -> Any:
        return Lion(self.parameters())
