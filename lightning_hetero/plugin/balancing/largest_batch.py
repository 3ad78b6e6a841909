"""A callback that finds the largest micro-batch that fits into each rank's memory, on all ranks at once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_hetero.balance.batch.caps import micro_batch_sizes
from lightning_hetero.balance.batch.search import Search
from lightning_hetero.distributed.collective_watch import refused_collectives
from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.lightning_packages import with_either_trainer
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.console import say
from lightning_hetero.plugin.common.lightning_private import before_batch_transfer
from lightning_hetero.plugin.common.protocols import BalancedStrategy, is_balanced
from lightning_hetero.plugin.step.gradients import kept_buffers, taken_aside
from lightning_hetero.plugin.step.log_capture import silent_log
from lightning_hetero.plugin.step.metrics import discarded_metrics
from lightning_hetero.plugin.step.out_of_memory import free_memory, is_out_of_memory
from lightning_hetero.plugin.step.step_output import loss_of

__all__ = ["LargestBatchFinder"]


@with_either_trainer
class LargestBatchFinder(Callback):
    """Finds how many samples each rank can process at once, and makes the strategy respect that limit.

    Lightning's BatchSizeFinder does not run under a distributed strategy. This one tries sizes after the first training
    step, when the state of the optimiser is allocated. Each rank runs forward and backward passes on samples of the
    training set by itself; it doubles the size and then bisects. Nothing remains of these trials: no gradient, no
    metric, no log, no random number drawn. A LoadBalancer then divides the global batch within these limits.

    Args:
        verbose: Whether to print the sizes that were found.

    Raises:
        ConfigurationError: An argument breaks its rule.
        UnsupportedFeatureError: The strategy is not ``hetero_ddp``, the training data are not a DataLoader of
            samples, or a training step cannot run on one rank alone: optimisation is manual, or the step communicates,
            as synchronised batch normalisation does.

    Attributes:
        found: Largest micro-batch of each rank in samples, at most the global batch size; empty before the search.

    Example::

        finder = LargestBatchFinder()
        trainer = Trainer(strategy="hetero_ddp", devices=2, callbacks=[finder])
        trainer.fit(model, train_loader)
        print(finder.found)  # for example (96, 24)
    """

    def __init__(self, verbose: bool = True) -> None:
        arguments.check_bool("verbose", verbose)
        super().__init__()
        self.verbose = verbose
        self.found: tuple[int, ...] = ()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not is_balanced(trainer.strategy):
            raise UnsupportedFeatureError(
                f"`LargestBatchFinder` needs a strategy that can divide batches unequally, got"
                f' {type(trainer.strategy).__name__}. Use Trainer(strategy="hetero_ddp") or remove the callback.'
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_steps_of_all_ranks(trainer)  # known since the training began, and before its first step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.found:
            return
        strategy = trainer.strategy
        assert is_balanced(strategy)
        with strategy.timer.waiting():  # ranks wait for the one that searches longest
            own = self._largest(strategy, trainer, pl_module)
            self.found = tuple(all_gather(own))
        strategy.micro_batch_limits.limit = min(own, strategy.micro_batch_limits.limit or own)
        if self.verbose:
            say(trainer, f"hetero_ddp: the largest micro-batches that fit, in samples per rank, are {list(self.found)}")

    def _largest(self, strategy: BalancedStrategy, trainer: Trainer, module: LightningModule) -> int:
        loader, part = trainer.train_dataloader, strategy.training_slice
        if not isinstance(loader, DataLoader) or part is None or not hasattr(loader.dataset, "__len__"):
            raise UnsupportedFeatureError(
                f"`LargestBatchFinder` needs a DataLoader over a dataset with a length, from which it can draw batches"
                f" of any size, got {type(loader).__name__}. Set `max_batch_size` instead."
            )
        # Start with the size that the latest step has run; its micro-batches are smaller if memory ran out.
        start = max(micro_batch_sizes(part.samples, strategy.micro_batch_limits.most), default=1)
        search = Search(start, most=part.global_samples)
        while (size := search.next_size()) is not None:
            search.tell(self._fits(strategy, module, loader, size))
        return search.largest

    def _fits(self, strategy: BalancedStrategy, module: LightningModule, loader: DataLoader[Any], size: int) -> bool:
        with ExitStack() as stack:
            kept = (isolate_rng(), discarded_metrics(module), silent_log(module), kept_buffers(module))
            for context in (*kept, strategy.micro_batches.alone(_REFUSAL), refused_collectives(_refuse_collective)):
                stack.enter_context(context)
            try:
                _run_passes(strategy, module, loader, size)
                fits = True
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
        free_memory(strategy.root_device)
        return fits


def _refuse_steps_of_all_ranks(trainer: Trainer) -> None:
    strategy = trainer.strategy
    why_one = strategy.micro_batch_limits.why_one if is_balanced(strategy) else None
    if why_one is not None:
        raise UnsupportedFeatureError(
            f"`LargestBatchFinder` runs steps of other sizes on each rank alone, which is impossible here, because"
            f" {why_one}. Remove the callback, and set `max_batch_size` instead."
        )


_REFUSAL = (
    "`LargestBatchFinder` runs a different number of steps on each rank, so a training step must not communicate,"
    " for example in a metric that is computed in it. Remove the callback, and set `max_batch_size` instead."
)


def _refuse_collective() -> None:
    raise UnsupportedFeatureError(_REFUSAL)


def _run_passes(strategy: BalancedStrategy, module: LightningModule, loader: DataLoader[Any], size: int) -> None:
    """Run a forward and a backward pass on ``size`` samples, and discard the gradients."""
    dataset: Any = loader.dataset
    batch = loader.collate_fn([dataset[i % len(dataset)] for i in range(size)])
    # as in Lightning's loop
    batch = before_batch_transfer(module, strategy.precision_plugin.convert_input(batch))
    batch = strategy.batch_to_device(batch, strategy.root_device)
    numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    with torch.enable_grad(), strategy.precision_plugin.train_step_context():
        loss = loss_of(module.training_step(batch, 0) if numbered else module.training_step(batch))
    # DDP does not prepare for this backward pass, so its hooks on the parameters leave the gradients alone.
    with taken_aside([p for p in module.parameters() if p.requires_grad]):
        loss.backward()
