"""All private names of Lightning that this package uses, each with the reason why.

tests/plugin/common/test_lightning_private.py fails if Lightning changes one of them.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.distributed import _destroy_dist_connection, _init_dist_connection
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_hetero.plugin.common.overridden import overridden

__all__ = [
    "accumulates",
    "before_batch_transfer",
    "called_by_lightning_loop",
    "combined_loaders",
    "connect_through",
    "current_hook",
    "evaluation_loop",
    "has_comm_hook",
    "inner_batch_sampler",
    "leaving_together",
    "lightning_closes_group",
    "logged_step",
    "logged_values",
    "samplers_stay",
    "set_batch_size",
    "telling_indices",
    "tells_indices",
    "trainer_of",
    "uses_post_local_sgd",
    "with_synchronised_layers",
    "wrap_checkpoint_io",
]


def called_by_lightning_loop() -> bool:
    """Return whether one of Lightning's loops has called the function that calls this one, an ``__iter__``.

    Loops reach their loaders through a CombinedLoader; a callback that looks at a batch does not. Only the module of
    the caller's caller tells them apart.
    """
    return bool(sys._getframe(2).f_globals.get("__name__") == CombinedLoader.__module__)


def combined_loaders(loop: Any) -> tuple[list[Any], str]:
    """Return the loaders of a loop, and how they are combined: the ``mode`` of ``CombinedLoader``.

    Publicly, a Trainer shows its loaders only as the user gave them, and no loop shows its mode.
    """
    combined = loop._combined_loader
    return ([], "") if combined is None else (combined.flattened, combined._mode)


def evaluation_loop(trainer: Trainer) -> Any:
    """Return the loop of the current evaluation; validation, sanity check and test have one each."""
    return trainer._evaluation_loop


def logged_values(trainer: Trainer) -> dict[str, Any]:
    """Return the dict in which ``self.log`` accumulates values, by name; empty if nothing can be logged."""
    values: dict[str, Any] | None = trainer._results
    return {} if values is None else values


def current_hook(module: LightningModule) -> str | None:
    """Return the name of the hook that Lightning is calling, under which it keeps what ``self.log`` is given."""
    return module._current_fx_name


def set_batch_size(trainer: Trainer, samples: int | None) -> None:
    """Set the weight of values that ``self.log`` averages from now on; None to take it from the batch.

    Lightning guesses it from the first tensor of a batch. Publicly, every call of ``self.log`` would have to give it.
    """
    results: Any = trainer._results
    if results is not None:
        results.batch_size = samples


def logged_step(loop: Any) -> int:
    """Return the step under which Lightning passes values that are logged now to its loggers."""
    return int(loop.epoch_loop._batches_that_stepped)


def trainer_of(module: LightningModule | None) -> Trainer | None:
    """Return the Trainer that a module belongs to, or None; ``module.trainer`` raises if there is none.

    Libraries delete the attribute to save a module without its Trainer.
    """
    return getattr(module, "_trainer", None)


def before_batch_transfer(module: LightningModule, batch: Any) -> Any:
    """Run the module's hook before a batch is moved to the device, as the loops do; no public method calls it."""
    return module._on_before_batch_transfer(batch, 0)


def samplers_stay(trainer: Trainer) -> None:
    """Make Lightning leave samplers as they are; a subclass of DDPStrategy cannot request that publicly."""
    trainer._accelerator_connector.use_distributed_sampler = False


@contextmanager
def leaving_together(trainer: Trainer, tell: Callable[[bool], bool]) -> Iterator[None]:
    """End a training that has received SIGTERM on all ranks at the same batch, in this context.

    Before each batch, Lightning 2.6 broadcasts a number of the device and reads it, for which the host waits until the
    device has finished all that it has been given. It also broadcasts in its signal handler, which meets other
    collectives of the peers. Nothing public changes how ranks learn of the signal.

    Args:
        trainer: The Trainer that is about to run; its signal handlers are not registered yet.
        tell: Function that gives all ranks a flag of rank 0; it is called before each batch.
    """
    loop, signals = trainer.fit_loop.epoch_loop, trainer._signal_connector
    patience: list[int] = []  # for how many batches this rank waits for rank 0, once it has received the signal

    def before_batch() -> None:
        leaves = tell(bool(patience))
        if patience:
            patience[0] -= 1
        if leaves or patience == [0]:  # nobody has sent the signal to rank 0
            signals.received_sigterm = True
            raise SIGTERMException

    def notify(signum: Any, _: Any) -> None:
        launcher: Any = trainer.strategy.launcher
        if launcher is not None and not patience:
            launcher.kill(signum)
        if trainer.training and trainer.state.fn == TrainerFn.FITTING:
            patience[:] = patience or [2]
        else:
            signals.received_sigterm = True

    with ExitStack() as stack:
        if hasattr(loop, "_broadcast_sigterm_tensor") and hasattr(signals, "_sigterm_notifier_fn"):
            stack.enter_context(overridden(loop, "_broadcast_sigterm_tensor", before_batch))
            stack.enter_context(overridden(signals, "_sigterm_notifier_fn", notify))
        yield


# ---- predictions -----------------------------------------------------------------------------------------------------


def telling_indices(batch_sampler: Any) -> Any:
    """Wrap a batch sampler as Lightning does for predictions, so that it can read the indices of a batch."""
    return _IndexBatchSamplerWrapper(batch_sampler)


def tells_indices(batch_sampler: Any) -> bool:
    """Return whether Lightning can read from a batch sampler which samples a prediction is for."""
    return isinstance(batch_sampler, _IndexBatchSamplerWrapper)


def inner_batch_sampler(batch_sampler: Any) -> Any:
    """Return a batch sampler without the wrapper of :func:`telling_indices`."""
    return batch_sampler._batch_sampler if isinstance(batch_sampler, _IndexBatchSamplerWrapper) else batch_sampler


# ---- strategies ------------------------------------------------------------------------------------------------------


def uses_post_local_sgd(strategy: DDPStrategy) -> bool:
    """Return whether the ranks' parameters are averaged instead of their gradients.

    The class of the hook's state is compared by name, because importing its module would import half of torch.
    """
    return type(strategy._ddp_comm_state).__name__ == "PostLocalSGDState" or strategy._model_averager is not None


def with_synchronised_layers(strategy: DDPStrategy, model: LightningModule) -> Any:
    """Return the module with the layers that ``Trainer(sync_batchnorm=True)`` asks for; no public attribute tells."""
    plugin = strategy._layer_sync
    return model if plugin is None else plugin.apply(model)


def accumulates(trainer: Trainer) -> bool:
    """Return whether the current batch ends without a step of the optimiser; no public method of the loop tells."""
    return trainer.fit_loop._should_accumulate()


def has_comm_hook(strategy: DDPStrategy) -> bool:
    """Return whether the user has given DDP another way to combine gradients."""
    return strategy._ddp_comm_hook is not None


def wrap_checkpoint_io(wrapper: CheckpointIO | None, inner: CheckpointIO) -> bool:
    """Put ``inner`` into ``wrapper`` if that is a plugin that wraps others, like the asynchronous one.

    The wrapper keeps a plugin that the user has put into it.

    Returns:
        Whether ``wrapper`` wraps others.
    """
    if not isinstance(wrapper, _WrappingCheckpointIO):
        return False
    wrapper.checkpoint_io = inner
    return True


def connect_through(
    environment: ClusterEnvironment, backend: str, store: Any, timeout: Any, device: torch.device
) -> None:
    """Start the process group as DDPStrategy does, but through a given store, which DDPStrategy does not accept."""
    _init_dist_connection(
        environment,
        backend,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
        store=store,
    )


def lightning_closes_group(closes: bool) -> None:
    """Set whether Lightning closes NCCL's group when this process exits, for which it has registered a handler.

    To close the group of a rank that has failed would wait for its peers, which wait for this rank.  Without the
    handler the group is aborted when it is deleted.
    """
    atexit.unregister(_destroy_dist_connection)
    if closes:
        atexit.register(_destroy_dist_connection)
