"""Models whose parameters are used in all the ways that shards must get right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class Block(nn.Module):
    """Two layers with a normalisation, and a residual connection."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 7)
        self.down = nn.Linear(7, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return result


class Plain(nn.Module):
    """Blocks between layers that belong to no unit."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(WIDTH, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def inner(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.inner(self.first(x))) * self.scale
        return result


class Checkpointed(Plain):
    """Blocks that run again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def inner(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Twice(Plain):
    """Every block is called twice, once after all others and once right after itself."""

    def inner(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(block(x))
        return super().inner(x)


class TwiceCheckpointed(Checkpointed):
    """Every block is called twice, and runs again in the backward pass."""

    def inner(self, x: Tensor) -> Tensor:
        return super().inner(super().inner(x))


class Tied(Plain):
    """A weight that two blocks share, and one that a block shares with the last layer."""

    def __init__(self) -> None:
        super().__init__()
        blocks: Any = self.blocks
        first, second, _ = blocks
        second.up.weight = first.up.weight
        self.last = nn.Linear(WIDTH, WIDTH)
        self.last.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.blocks.append(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
        blocks[3][0].weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(dim=-1, keepdim=True)


class Frozen(Plain):
    """A block that is frozen, and one of which only the last layer is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)
        self.blocks[2].requires_grad_(False)
        self.blocks[2].down.requires_grad_(True)
        self.first.bias.requires_grad_(False)


class Branches(Plain):
    """Blocks side by side, which return dictionaries, and one whose inner result is used in the loss."""

    class Named(Block):
        def forward(self, x: Any) -> Any:
            self.hidden = self.up(self.norm(x))
            return {"result": [super().forward(x)]}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branches.Named() for _ in range(3))

    def inner(self, x: Tensor) -> Tensor:
        blocks: Any = self.blocks
        results = torch.stack([block(x)["result"][0] for block in blocks])
        return results.sum(dim=0) + torch.stack([block.hidden.mean() ** 2 for block in blocks]).sum()


class OnlyInside(Branches):
    """A block whose output is not used, but an inner result of it is."""

    def inner(self, x: Tensor) -> Tensor:
        blocks: Any = self.blocks
        blocks[1](x)
        for block in (blocks[0], blocks[2]):
            x = block(x)["result"][0]
        inside: Tensor = blocks[1].hidden.mean()
        return x + inside


class Recurrent(nn.Module):
    """Layers that keep lists of their parameters, and one whose parameters are used without its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.LSTM(5, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)])
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.blocks[0](x[:, None, :].expand(-1, 3, -1))
        x, _ = self.blocks[1](x, x, x)
        result: Tensor = self.last(x.mean(dim=1))
        return result


class Half(Block):
    """A block whose normalisation is in single precision."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.tanh(self.up(self.norm(x.float()).to(x.dtype))))
        return result


class MixedTypes(Plain):
    """A unit with parameters of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = Half()


class Unused(Plain):
    """A block that is never used, and a layer that is not used in every step or on every rank."""

    def inner(self, x: Tensor) -> Tensor:
        a, _, c = self.blocks
        x = a(x)
        return c(x) if bool(x.detach().sum() > 0) else x


class Skipping(Plain):
    """Blocks that are skipped at random, on each rank for itself."""

    def inner(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if int(x.detach().abs().sum() * 1000) % (number + 2):
                x = block(x)
        return x


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model of known weights in float64."""
    torch.manual_seed(3)
    model = make().double()
    if isinstance(model, MixedTypes):
        model.blocks[1].norm.float()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "checkpointed": partial(Checkpointed, reentrant=False),
    "checkpointed reentrantly": partial(Checkpointed, reentrant=True),
    "twice": Twice,
    "twice, checkpointed": partial(TwiceCheckpointed, reentrant=False),
    "twice, checkpointed reentrantly": partial(TwiceCheckpointed, reentrant=True),
    "tied": Tied,
    "frozen": Frozen,
    "branches": Branches,
    "recurrent": Recurrent,
    "mixed types": MixedTypes,
}
NOT_ALWAYS_USED: dict[str, Callable[[], nn.Module]] = {
    "unused": Unused,
    "skipping": Skipping,
    "only inside": OnlyInside,
}
