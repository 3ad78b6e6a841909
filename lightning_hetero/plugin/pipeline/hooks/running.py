"""Run the hooks of the module and of the user's callbacks on every rank, with what the steps have collected."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_hetero.distributed.collectives import broadcast_from
from lightning_hetero.distributed.group.failure import failure_of_peers
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.distributed.pipeline.structure import Call
from lightning_hetero.distributed.random_state import random_state, restore_random_state
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common.lightning_private import current_hook, trainer_of
from lightning_hetero.plugin.common.overridden import overridden_method
from lightning_hetero.plugin.pipeline.hooks.meeting import Meeting
from lightning_hetero.plugin.pipeline.hooks.names_read import is_users, names_before, names_read
from lightning_hetero.plugin.pipeline.hooks.traces import StepTraces
from lightning_hetero.plugin.step.seeded import seeded

__all__ = ["HookRunner"]

_LOOPS = ("validation", "test", "predict")
_OF_EPOCHS = (
    *(f"on_{part}_{when}" for part in ("fit", "train", "train_epoch") for when in ("start", "end")),
    *(f"on_{loop}_{when}" for loop in _LOOPS for when in ("start", "epoch_start", "epoch_end", "end")),
)
_OF_BATCHES = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    *(f"on_{loop}_batch_{when}" for loop in _LOOPS for when in ("start", "end")),
)
# These run around the step or on what the step returns; they are only read for the names that they mention.
_AROUND_STEPS = ("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "on_before_backward", "backward")
_STEPS = ("training_step", *(f"{loop}_step" for loop in _LOOPS))
# Names in a hook that looks at parameters as tensors, and at gradients.
_GRADIENTS = frozenset(
    {"grad", "grad_norm", "clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"}
)
_TENSORS = _GRADIENTS | {
    "parameters", "named_parameters", "state_dict", "parameters_to_vector", "weight", "bias", "deepcopy",
}  # fmt: skip


class HookRunner:
    """The hooks of one run on this rank.

    Args:
        module: The user's LightningModule.
        called: The model that steps call.
        placement: Where the parts of the model live.
        run_model: Function that runs the layers on all ranks, and returns the output on the last stage.
        rank: This rank.
        device: This rank's device.
        seed: Seed of the random numbers that are the same on all ranks.

    Attributes:
        meeting: What ranks do together within a hook.
        traces: What steps have changed.
    """

    def __init__(
        self,
        module: LightningModule,
        called: nn.Module,
        placement: TensorPlacement,
        run_model: Callable[[Call], Any],
        rank: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self._module = module
        self._called = called
        self._placement = placement
        self._run_model = run_model
        self._last_rank = placement.plan.last_ranks[0]
        self._leads = rank == self._last_rank
        self._device = device
        self._seed = seed
        self._hooks_run = 0
        self._read: dict[str, frozenset[str]] = {}
        self._warned: set[str] = set()
        self._module_name = next((n for n, m in module.named_children() if m is called), "forward")
        self._parameters = {
            name.rsplit(".", 1)[-1] for name, p in module.named_parameters() if placement.is_outside_layers(p)
        }
        self.meeting = Meeting(self._last_rank, self._run_forward, leads=self._leads)
        self.traces = StepTraces(
            module, placement, rank, device, self.read_before, self.read_in_steps, self._read_in_hooks
        )

    @contextmanager
    def installed(self, record_log: Callable[[], Any]) -> Iterator[None]:
        """Run hooks through this object in this context.

        Args:
            record_log: Function that returns a context in which the module's ``log`` is recorded: see ``recorded_log``
                of :class:`~lightning_hetero.plugin.pipeline.step.PipelineStep`.
        """
        module = self._module
        with ExitStack() as stack:
            for owner in (module, *self._callbacks()):
                for name in (*_OF_EPOCHS, *_OF_BATCHES):
                    hook = getattr(owner, name, None)
                    compares = isinstance(owner, BaseFinetuning) and name in _OF_EPOCHS
                    if hook is None or not (is_users(hook) or (compares and is_overridden(name, owner, Callback))):
                        continue
                    names = _TENSORS if compares else frozenset(names_read([hook], owner, module))
                    run: Any = self._run_of_epoch if name in _OF_EPOCHS else self._run_of_batch
                    record = record_log if owner is module else None
                    around = partial(self._by_lightning, name, partial(run, name, names, record))
                    stack.enter_context(overridden_method(owner, name, around))
            stack.enter_context(overridden_method(self._called, "forward", self._forward))
            yield

    def _callbacks(self) -> list[Any]:
        trainer: Any = trainer_of(self._module)
        return [] if trainer is None else list(trainer.callbacks)

    # ---- names -----------------------------------------------------------------------------------------------------

    def read_in_steps(self) -> frozenset[str]:
        """Return the names of attributes that are read before the model is called, or in hooks of a batch."""
        if "steps" not in self._read:
            hooks = self._users((*_OF_BATCHES, *_AROUND_STEPS))
            found = {name for hook, owner in hooks for name in names_read([hook], owner, self._module)}
            self._read["steps"] = frozenset(found) | self.read_before()
        return self._read["steps"]

    def read_before(self) -> frozenset[str]:
        """Return the names of attributes that are mentioned before the model is called."""
        if "before" not in self._read:
            steps = [getattr(self._module, name, None) for name in _STEPS]
            transfers = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
            found = {n for step in steps if is_users(step) for n in names_before(step, self._module, self._module_name)}
            found |= {n for hook, owner in self._users(transfers) for n in names_read([hook], owner, self._module)}
            self._read["before"] = frozenset(found)
        return self._read["before"]

    def _read_in_hooks(self) -> frozenset[str]:
        hooks = self._users((*_OF_EPOCHS, *_OF_BATCHES, *_AROUND_STEPS))
        found = {name for hook, owner in hooks for name in names_read([hook], owner, self._module)}
        return frozenset(found) | self.read_before()

    def _users(self, names: tuple[str, ...]) -> list[tuple[Any, Any]]:
        owners = (self._module, *self._callbacks())
        found = [(getattr(owner, name, None), owner) for owner in owners for name in names]
        return [(hook, owner) for hook, owner in found if is_users(hook)]

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _by_lightning(self, name: str, run: Callable[..., Any], hook: Any, *args: Any, **kwargs: Any) -> Any:
        if current_hook(self._module) != name:  # the user calls it
            return hook(*args, **kwargs)
        with failure_of_peers(), self._understood(name):
            return run(partial(hook, *args, **kwargs))

    def _run_of_epoch(
        self, name: str, names: frozenset[str], record: Callable[[], Any] | None, hook: Callable[[], Any]
    ) -> Any:
        self.traces.equalise()
        with self._random_numbers_of_leader(), self._tensors(names, gradients=False):
            return self._together(name, record, hook)

    def _run_of_batch(
        self, name: str, names: frozenset[str], _: Callable[[], Any] | None, hook: Callable[[], Any]
    ) -> Any:
        self._hooks_run += 1
        with (
            seeded(self._seed, self._hooks_run, zlib.crc32(name.encode())),
            self._tensors(names, gradients=bool(names & _GRADIENTS), warned=name),
        ):
            # what calls the model does so on all ranks, whatever condition on the rank is around it
            calls = self._module_name in names and not names & _TENSORS
            return self._together(name, None, hook) if calls else hook()

    def _together(self, name: str, record: Callable[[], Any] | None, hook: Callable[[], Any]) -> Any:
        with self.meeting.of(name):
            if record is None:
                result = hook()
                self.meeting.end(None)
                return result
            with record() as pass_on:
                result = hook()
            pass_on(self.meeting.end)
            return result

    @contextmanager
    def _random_numbers_of_leader(self) -> Iterator[None]:
        """Draw the same numbers as the last stage, without changing the generators of other ranks."""
        is_cuda = self._device.type == "cuda"
        state = {**random_state(None), "cuda": torch.cuda.get_rng_state(self._device) if is_cuda else None}
        state = broadcast_from(state if self._leads else {}, self._last_rank)
        if self._leads:
            yield
            return
        with isolate_rng():
            cuda = state.pop("cuda")
            restore_random_state(None, state)
            if is_cuda and cuda is not None:
                torch.cuda.set_rng_state(cuda, self._device)
            yield

    @contextmanager
    def _tensors(self, names: frozenset[str], *, gradients: bool, warned: str = "") -> Iterator[None]:
        if not names & (_TENSORS | self._parameters):
            yield
            return
        if warned and warned not in self._warned:
            self._warned.add(warned)
            rank_zero_warn(
                f"`hetero_pipeline`: `{warned}` looks at parameters or gradients of the whole model, so each of its"
                f" calls copies them to every rank. Use a hook of the epoch if it need not do so in each step."
            )
        with self._placement.whole(gradients=gradients):
            yield

    @contextmanager
    def _understood(self, name: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            if re.search(r"\bmeta\b", str(error)) is None:  # the device of tensors without memory
                raise
            raise UnsupportedFeatureError(
                f"`hetero_pipeline` has layers of other ranks without memory, and {name!r} uses a tensor of them. Use"
                f" `with self.trainer.strategy.whole_model():` around it, or call the whole model."
            ) from error

    # ---- the model outside of steps --------------------------------------------------------------------------------

    def share_value(self, value: Any) -> Any:
        """Return a value of the last stage on every rank that asks for it."""
        return self.meeting.value(value) if self.meeting.is_on else broadcast_from(value, self._last_rank)

    def _forward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.traces.runs_layers:
            return own(*args, **kwargs)
        modes = [part.training for part in self._called.modules()]
        arguments = move_data_to_device((args, kwargs, modes), torch.device("cpu"))
        if self.meeting.is_on:
            return self.meeting.forward(arguments)
        with failure_of_peers():
            return self._run_forward(broadcast_from(arguments, self._last_rank))

    def _run_forward(self, arguments: Any) -> Any:
        args, kwargs, modes = move_data_to_device(arguments, self._device)
        parts = list(self._called.modules())
        before = [part.training for part in parts]
        try:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode
            output = self._run_model(Call(args, kwargs))
        finally:
            for part, mode in zip(parts, before, strict=True):
                part.training = mode
        output = move_data_to_device(output, torch.device("cpu"))
        return move_data_to_device(broadcast_from(output, self._last_rank), self._device)
