"""Optimisers that look at all parameters are recognised by what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer

from lightning_hetero.distributed.optimizer_check import why_whole_model

_Made = Callable[[Any], Optimizer]


class Sam(Optimizer):
    """Two closures, and the norm of all gradients."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = SGD(self.param_groups, lr=0.1)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad * 0.05 / norm)
            closure()
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        self.base.step()
        return loss


class Clipping(AdamW):
    """Clips by the norm of all gradients, as some implementations of LAMB do."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        super().step()
        return loss


class OneStepSize(SGD):
    """Estimates one step size for all, as Prodigy and D-Adaptation do, and uses it from the next step on."""

    size = 1e-6

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            group["lr"] = self.size
        self.size *= 1 + sum(float(p.grad.abs().mean()) for group in self.param_groups for p in group["params"])
        super().step()
        return loss


class LayerWise(Optimizer):
    """The ratio of two norms of each parameter, as LARS has it, and noise."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * float(p.norm() / p.grad.norm()))
                    p.add_(torch.randn_like(p), alpha=0.01)
        return loss


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model[1].weight.requires_grad = False
    return list(model.parameters())


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> None:
    """An optimiser's first step imports torch's compiler, which sets an environment variable."""
    SGD([nn.Parameter(torch.ones(1))], 0.1).step()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: SGD(p, 0.1, momentum=0.9), None),
        (lambda p: AdamW([{"params": p[:3]}, {"params": p[3:], "lr": 1.0}], fused=True), None),
        (Adagrad, None),
        (Adafactor, None),
        (LayerWise, None),
        (lambda p: torch.optim.LBFGS([q for q in p if q.requires_grad]), "runs the training step several times"),
        (lambda p: torch.optim.LBFGS([q for q in p if q.requires_grad], max_iter=1), "the gradients of others"),
        (lambda p: Sam([q for q in p if q.requires_grad]), "runs the training step several times"),
        (Clipping, "depending on the gradients of others"),
        (lambda p: OneStepSize([q for q in p if q.requires_grad], 0.1), "depending on the gradients of others"),
    ],
)
def test_what_an_optimiser_looks_at(make: _Made, reason: str | None) -> None:
    own = parameters()
    optimizer = make(own)
    before = [p.detach().clone() for p in own]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # replaces `step`
    drawn = torch.get_rng_state()
    states = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    found = why_whole_model(optimizer)
    assert (found is None) if reason is None else reason in str(found)
    # nothing has changed
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
    assert all(p.grad is None for p in own)
    assert torch.equal(drawn, torch.get_rng_state())
    assert states.keys() == optimizer.state.keys()
    for p, state in states.items():
        assert all(torch.equal(value, optimizer.state[p][key]) for key, value in state.items())


def test_parameters_of_other_ranks_have_no_memory() -> None:
    with torch.device("meta"):
        foreign = nn.Linear(4, 4)
    own = nn.Linear(4, 4)
    every = [*foreign.parameters(), *own.parameters()]
    assert why_whole_model(AdamW(every)) is None
    assert why_whole_model(Clipping(every)) is not None
    assert why_whole_model(Clipping(every[:1])) is None, "one parameter is whole on its rank"
