"""Run torch's zero-bubble schedules with equal stages on devices of known speed, in a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from scenarios import Scenario
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

from lightning_hetero.balance.pipeline.stage_solver import uniform_stages

__all__ = ["ZERO_BUBBLE", "zero_bubble_s"]

ZERO_BUBBLE = ("torch interleaved zero bubble", "torch ZBV")
SKIPPED_STEPS = 1


class Stage(nn.Module):
    """Layers of a stage that take as long as on a device of known speed, a third for each part of a micro-batch.

    What the layers compute takes little. Sleeping belongs to the two parts of a backward pass and not to its graph,
    since torch walks through the graph twice.
    """

    def __init__(self, layers: int, features: int, seconds: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(features, features) for _ in range(layers)))
        self.part_s = seconds / 3

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, after a third of the time."""
        until_s = time.perf_counter() + self.part_s
        output: Any = _Sleep.apply(self.layers(x), self)  # type: ignore[no-untyped-call]
        _sleep_until(until_s)
        return output  # type: ignore[no-any-return]

    def later(self) -> Callable[..., None]:
        """Return what stands for the gradients of parameters, which torch computes with those of inputs here."""
        return lambda: _sleep_until(time.perf_counter() + self.part_s)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Stage) -> Tensor:
        ctx.stage = stage
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _sleep_until(time.perf_counter() + ctx.stage.part_s)
        return *gradients, None


def _sleep_until(end_s: float) -> None:
    left_s = end_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


def zero_bubble_s(scenario: Scenario, name: str, layers: int, features: int, micro_batches: int, steps: int) -> float:
    """Return the median seconds of a step of a zero-bubble schedule, with two equal stages per rank.

    Args:
        scenario: The devices.
        name: One of ``ZERO_BUBBLE``.
        layers: Number of layers of the model.
        features: Features of each layer.
        micro_batches: Number of micro-batches per step.
        steps: Number of steps.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    is_v = name == ZERO_BUBBLE[1]
    own = (rank, 2 * size - 1 - rank if is_v else rank + size)
    ends = (0, *uniform_stages(layers, 2 * size).ends)
    samples = scenario.batch_size // micro_batches
    layer_s = scenario.factors[rank] * scenario.seconds_per_sample * samples
    modules = [Stage(ends[i + 1] - ends[i], features, (ends[i + 1] - ends[i]) * layer_s) for i in own]
    stages = []
    for number, module in zip(own, modules, strict=True):
        example = torch.empty(samples, features, device="meta", requires_grad=number > 0)
        output = torch.empty_like(example).requires_grad_()
        arguments: dict[str, Any] = {"input_args": (example,), "output_args": (output,), "dw_builder": module.later}
        stages.append(PipelineStage(module, number, 2 * size, torch.device("cpu"), **arguments))
    kind: Any = ScheduleZBVZeroBubble if is_v else ScheduleInterleavedZeroBubble
    schedule = kind(stages, micro_batches, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.01)
    batch, seconds = torch.randn(scenario.batch_size, features), []
    for _ in range(steps):
        begun_s = time.perf_counter()
        optimizer.zero_grad()
        schedule.step(
            *((batch,) if 0 in own else ()),
            target=batch if 2 * size - 1 in own else None,
            return_outputs=False,
        )
        optimizer.step()
        dist.barrier()
        seconds.append(time.perf_counter() - begun_s)
    return median(seconds[SKIPPED_STEPS:])
