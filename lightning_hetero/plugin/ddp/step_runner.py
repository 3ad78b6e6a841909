"""Run the user's step on parts of a rank's mini-batch, with or without DDP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from torchmetrics import Metric

from lightning_hetero.plugin.common.protocols import StepOwner
from lightning_hetero.plugin.step.gradients import muted_gradients
from lightning_hetero.plugin.step.loss_weights import loss_weights
from lightning_hetero.plugin.step.no_terms import with_weighted_gradient
from lightning_hetero.plugin.step.split_batch import split_batch
from lightning_hetero.plugin.step.step_output import loss_of

__all__ = ["StepRunner"]


class StepRunner:
    """Operations of a training step that do not depend on how it is divided into micro-batches.

    Args:
        strategy: The strategy whose steps are run.
    """

    def __init__(self, strategy: StepOwner) -> None:
        self._strategy = strategy
        self._all_parameters = tuple(self.module.parameters())

    @property
    def module(self) -> LightningModule:
        """The user's LightningModule."""
        assert self._strategy.lightning_module is not None
        return self._strategy.lightning_module

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self._all_parameters if p.requires_grad]

    @property
    def is_static(self) -> bool:
        """Whether DDP was told that the graph is static.

        DDP then counts the backward passes of the first step and expects as many in each later step, so the early
        micro-batches are hidden from it.
        """
        return getattr(self._strategy.model, "static_graph", False)

    @property
    def accumulated_batches(self) -> int:
        """Number of batches whose gradients Lightning accumulates in one optimiser step."""
        return self._strategy.trainer.accumulate_grad_batches if self.module.automatic_optimization else 1

    def why_one(self) -> str | None:
        """Return why a step cannot run in several micro-batches; None if it can."""
        module = self.module
        if self._strategy.why_one_micro_batch is not None:
            return self._strategy.why_one_micro_batch
        if not module.automatic_optimization:
            return "only automatic optimisation can be repeated in smaller micro-batches"
        if any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules()):
            return "synchronised batch normalisation communicates in every micro-batch"
        if any(isinstance(layer, Metric) and layer.dist_sync_on_step for layer in module.modules()):
            return "a metric with `dist_sync_on_step=True` communicates in every micro-batch"
        return None

    def split(self, batch: Any, sizes: Sequence[int]) -> list[Any]:
        """Return ``batch`` divided into micro-batches of these sizes."""
        loader = self._strategy.trainer.train_dataloader
        return split_batch(batch, sizes, lists_are_fields=getattr(loader, "collate_fn", None) is default_collate)

    def weights(self, parts: Sequence[Any], sizes: Sequence[int]) -> list[float]:
        """Return the weight of each micro-batch's loss in the loss of all of them."""
        return loss_weights(parts, sizes, self._strategy.loss_reduction, self._strategy.num_loss_terms)

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients in this context without combining them with those of other ranks."""
        model = self._strategy.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def forward_without_ddp(self, *args: Any) -> Any:
        """Run the user's step without DDP."""
        with self._strategy.precision_plugin.train_step_context():
            return self.module.training_step(*args)

    def weighted_loss(self, output: Any, weight: float) -> Tensor:
        """Return a step's loss as Lightning's hooks are given it, with the gradient of the loss times ``weight``."""
        accumulated = self.accumulated_batches
        return with_weighted_gradient(loss_of(output) / accumulated, weight * accumulated)

    def gradients_of(self, output: Any, weight: float, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
        """Return the gradients of a step's loss, times ``weight``, without running DDP's hooks."""
        strategy = self._strategy
        weight *= strategy.loss_weight
        loss = strategy.precision_plugin.pre_backward(self.weighted_loss(output, weight), self.module)
        with muted_gradients(parameters) if weight == 0.0 else nullcontext():
            return torch.autograd.grad(loss, parameters, allow_unused=True)
