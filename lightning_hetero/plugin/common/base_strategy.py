"""The common base of both strategies: how they count ranks, save checkpoints and fail."""

from __future__ import annotations

import inspect
import logging
import re
import traceback
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_hetero.distributed.collectives import (
    all_gather_counts,
    all_wait,
    broadcast_flag,
    broadcast_from,
    reduce_in_place,
)
from lightning_hetero.distributed.group.attempt_store import attempt_store, may_be_stale
from lightning_hetero.distributed.group.failure import (
    announce,
    announced,
    begin_run,
    begin_teardown,
    failure_of_peers,
    finishing,
    pass_on,
    stop_watching,
    watch_peers,
    why_communication_failed,
)
from lightning_hetero.distributed.group.leave_group import leave_group_at_exit, stay_in_group
from lightning_hetero.distributed.host_group import host_group, is_initialized
from lightning_hetero.exceptions import RankFailedError
from lightning_hetero.lightning_packages import become_native, is_foreign
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.checkpoint_file import WholeFileCheckpointIO
from lightning_hetero.plugin.common.environment import UnevenTorchrunEnvironment, differs_from_torchrun
from lightning_hetero.plugin.common.lightning_private import (
    connect_through,
    leaving_together,
    lightning_closes_group,
    trainer_of,
    wrap_checkpoint_io,
)
from lightning_hetero.plugin.common.loop_progress import TrainingProgress

__all__ = ["BaseStrategy"]

Self = TypeVar("Self", bound="BaseStrategy")

_log = logging.getLogger(__name__)

_LOADERS_KEY = "lightning_hetero"
# arguments of DDPStrategy that control how gradients are averaged
_OF_AVERAGING = ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period")


class BaseStrategy(DDPStrategy):
    """A strategy whose nodes may have different numbers of ranks, and whose ranks tell their peers why they fail."""

    strategy_name = ""
    _failed = False
    _last_trainer: weakref.ref[Trainer] | None = None
    _signals: ExitStack | None = None

    def _check_keywords(self, keywords: Mapping[str, Any], not_wrapped: str = "") -> None:
        """Check the arguments that Lightning's DDPStrategy and torch's DistributedDataParallel receive.

        Args:
            keywords: Arguments to pass on. LightningCLI passes every default.
            not_wrapped: Why the strategy wraps no module and so has no use for the arguments of wrapping; empty if it
                wraps one.
        """
        of_ddp = _defaults_of(DistributedDataParallel)
        accepted = {**of_ddp, **_defaults_of(DDPStrategy)}
        excluded = dict.fromkeys(("module", "device_ids"), "Lightning passes it itself")
        if not_wrapped:
            excluded = {**dict.fromkeys((*of_ddp, *_OF_AVERAGING), not_wrapped), **excluded}
        given = [name for name, value in keywords.items() if name not in accepted or value is not accepted[name]]
        arguments.check_keywords(type(self).__name__, given, [*_defaults_of(type(self))], accepted, excluded)
        arguments.check_launching(keywords)

    @override
    def set_world_ranks(self) -> None:
        # The Trainer's constructor calls this before it makes the launcher, which asks the environment.
        environment = self.cluster_environment
        if type(environment) is TorchElasticEnvironment and differs_from_torchrun(self.num_processes, self.num_nodes):
            self.cluster_environment = UnevenTorchrunEnvironment()
        super().set_world_ranks()
        known = self.cluster_environment is not None
        self.check_world_size(self.world_size if known else self.num_nodes * self.num_processes)

    def check_world_size(self, world_size: int) -> None:
        """Check the arguments that depend on the number of ranks, before any process is launched."""

    # ---- Trainers: none, one, or one after the other ----------------------------------------------------------------

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        # the first thing that a Trainer does to a strategy
        if is_foreign(accelerator, Accelerator):
            become_native(self)
            self.accelerator = accelerator
        self._accelerator = accelerator

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        trainer = trainer_of(model)
        if trainer is None:  # libraries save modules that were never trained
            return
        if self._last_trainer is not None and self._last_trainer() is not trainer:
            self.renew()
        self._last_trainer = weakref.ref(trainer)
        self.begin_with(trainer, model)

    def begin_with(self, trainer: Trainer, model: LightningModule) -> None:
        """Prepare for what ``trainer`` runs next."""

    def renew(self) -> None:
        """Forget what was found with another Trainer, or in the strategy that this one was copied from."""

    def __copy__(self: Self) -> Self:
        other = type(self).__new__(type(self))
        vars(other).update(vars(self), _signals=None)
        other.renew()  # the parts of the original know only the original
        return other

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last_trainer": None, "_signals": None}

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = WholeFileCheckpointIO()
        else:
            wrap_checkpoint_io(self._checkpoint_io, WholeFileCheckpointIO())
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    def loaders_state(self) -> Any:
        """Return the state of the training loaders for a checkpoint, as plain values; called on rank 0."""

    def load_loaders_state(self, state: Any) -> None:
        """Resume from a state that :meth:`loaders_state` has returned; None if the checkpoint holds none."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            checkpoint = {**checkpoint, _LOADERS_KEY: {self.strategy_name: self.loaders_state()}}
        with finishing():
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        of_strategies = checkpoint.get(_LOADERS_KEY)
        self.load_loaders_state(of_strategies.get(self.strategy_name) if isinstance(of_strategies, dict) else None)
        return checkpoint

    # ---- a run -----------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        self._failed = False
        if self.world_size > 1:
            begin_run()
        super().setup_environment()
        self._leave_signals()
        trainer = trainer_of(self.lightning_module)
        if trainer is not None and self.world_size > 1:
            self._signals = ExitStack()
            self._signals.enter_context(leaving_together(trainer, broadcast_flag))

    @override
    def setup_distributed(self) -> None:
        environment = self.cluster_environment
        if isinstance(environment, TorchElasticEnvironment) and may_be_stale() and not dist.is_initialized():
            # as DDPStrategy, which cannot be given a store; tests/faults/test_crash.py fails if that changes
            self.set_world_ranks()
            self._process_group_backend = self._get_process_group_backend()
            where = environment.main_address, environment.main_port
            timeout = self._timeout or default_pg_timeout
            store = attempt_store(*where, self.global_rank, self.world_size, timeout)
            connect_through(environment, self._process_group_backend, store, timeout, self.root_device)
        super().setup_distributed()  # keeps a process group that exists
        assert environment is not None
        watch_peers(environment.main_address, lambda: self.is_alone)
        if is_initialized():
            host_group(self._timeout)  # made here, where all ranks are at the same point

    @override
    def process_dataloader(self, dataloader: object) -> object:
        trainer = trainer_of(self.lightning_module)
        if trainer is not None and trainer.training:
            TrainingProgress(trainer).undo_unfinished_step()
        return super().process_dataloader(dataloader)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            assert self.lightning_module is not None
            TrainingProgress(self.lightning_module.trainer).begin_epoch()
        super().on_train_batch_start(batch, batch_idx)

    # If a rank fails, callbacks may save a checkpoint before its peers are told: they wait elsewhere and do not answer.

    @property
    def is_alone(self) -> bool:
        """Whether peers may miss the collectives that this rank reaches now, so that it goes on without them."""
        trainer = trainer_of(self.lightning_module)
        return trainer is not None and trainer.interrupted

    # What is no tensor travels between hosts: through a device's backend, it would wait for the devices.

    @override
    @failure_of_peers()
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_alone:
            all_wait()

    @override
    @failure_of_peers()
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return broadcast_from(obj, src) if is_initialized() and not self.is_alone else obj

    @override
    @failure_of_peers()
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        # Lightning waits for all ranks first, and on a device's backend for the device
        reduces = isinstance(tensor, Tensor) and is_initialized() and not self.is_alone
        return reduce_in_place(tensor, reduce_op or "sum", group) if reduces else tensor

    @override
    @failure_of_peers()
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.is_alone:
            return decision
        agreeing = sum(all_gather_counts(int(decision)))
        return agreeing == self.world_size if all else agreeing > 0

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        stay_in_group()
        lightning_closes_group(False)
        if isinstance(exception, RankFailedError):
            pass_on(str(exception))
        else:
            reason = announced() or why_communication_failed(exception)
            if reason is None:
                told = "".join(traceback.format_exception(exception))
                # this rank's own output may be cut off when all ranks are ended
                announce(f"rank {self.global_rank} with\n{told}")
            else:
                pass_on(reason)
                # otherwise this rank has announced itself why it fails, or peers have been told by what it sent
                if not re.match(rf"rank {self.global_rank}\b", reason, re.IGNORECASE):
                    _log.error("Another rank has failed: %s", reason)
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        if self._failed:
            begin_teardown()
        else:  # a process started by `spawn` does not get here if it fails
            leave_group_at_exit()
            if self._process_group_backend == "nccl":
                lightning_closes_group(True)
        self._leave_signals()
        try:
            super().teardown()
        finally:
            stop_watching()

    def _leave_signals(self) -> None:
        signals, self._signals = self._signals, None
        if signals is not None:
            signals.close()


def _defaults_of(target: type[Any]) -> dict[str, Any]:
    """Return the arguments of a constructor with their defaults."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(target.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self" and p.kind not in variadic}
