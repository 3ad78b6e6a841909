"""Give what steps leave in the module, its optimisers and its Trainer to the ranks that did not run them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.distributed.module_state import Changes, ModuleState
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.distributed.torch_private import version_of
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common.lightning_private import trainer_of

__all__ = ["StepTraces", "Traces"]

_INTERNAL = frozenset(vars(nn.Module()))
_LIGHTNING = frozenset(vars(LightningModule()))
_SETTINGS = (bool, int, float, str, tuple)  # of optimisers; to compare tensors would wait for their device


@dataclass(frozen=True)
class Traces:
    """What a step has changed, other than its output and what it logs.

    Attributes:
        changes: Attributes that are read before the next step's model or in a hook of the same batch; None if none.
        should_stop: Whether the training is to stop.
        groups: Settings of the groups of each optimiser, if one has changed.
        trained: Whether each parameter is trained, if one has changed.
    """

    changes: Changes | None
    should_stop: bool
    groups: list[list[dict[str, Any]]] | None
    trained: tuple[bool, ...] | None


class StepTraces:
    """Finds what the steps of one rank have changed.

    What only hooks of an epoch read is given once, before the first of them. What the first stage or a hook of a batch
    reads is given with each step.

    Args:
        module: The user's LightningModule.
        placement: Where the parts of the model live.
        rank: This rank.
        device: This rank's device.
        read_before: Names that are read before the model is called.
        read_in_steps: Names that are read before the model is called, or in hooks of a batch.
        read_in_hooks: Names that are read in any hook.
    """

    def __init__(
        self,
        module: LightningModule,
        placement: TensorPlacement,
        rank: int,
        device: torch.device,
        read_before: Callable[[], frozenset[str]],
        read_in_steps: Callable[[], frozenset[str]],
        read_in_hooks: Callable[[], frozenset[str]],
    ) -> None:
        self._module = module
        self._placement = placement
        self._rank = rank
        self._read_before = read_before
        self._read_in_steps = read_in_steps
        self._read_in_hooks = read_in_hooks
        self._is_last = placement.plan.last_ranks[0] == rank
        self._ranks: dict[str, int] | None = None
        left_out = _LIGHTNING
        arguments: Any = (module, device, self._known, left_out, self._is_of_this_rank, self._is_shared)
        self._epoch = ModuleState(*arguments)
        self._step = ModuleState(*arguments)
        self._parameters: list[Any] | None = None
        self._has_run = False
        self.runs_layers = False
        self._warned: set[Any] = set()
        self._before: tuple[Any, ...] = ()

    def moved(self) -> None:
        """Forget which rank runs which layer."""
        self._ranks = self._parameters = None
        self._epoch.refresh()
        self._step.refresh()

    @contextmanager
    def running_layers(self) -> Iterator[None]:
        """Let calls of the model's ``forward`` in this context be those of its own code, which runs its layers."""
        before, self.runs_layers = self.runs_layers, True
        try:
            yield
        finally:
            self.runs_layers = before

    # ---- a step ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Note what there is before a step; every rank must call this."""
        if not self._has_run:
            self._has_run = True
            self.moved()  # a hook may have replaced submodules
            self._epoch.begin()
        if self._is_last:
            names = self._read_in_steps()
            if names:
                self._step.begin(names)
            self._before = (self._groups(), self.trained())

    def settings(self) -> tuple[bool, Any, Any]:
        """Return whether the training is to stop, settings of the optimisers, and which parameters are trained."""
        return self._module.trainer.should_stop, self._groups(), self.trained()

    def found(self) -> Traces:
        """Return what the step has changed, on the rank that runs all of it."""
        names = self._read_in_steps()
        groups, trained = self._groups(), self.trained()
        changes = self._step.changes(names) if names else None
        if changes is not None and changes.refused:
            self._refuse(changes)
        return Traces(
            changes,
            self._module.trainer.should_stop,
            groups if groups != self._before[0] else None,
            trained if trained != self._before[1] else None,
        )

    def take(self, traces: Traces) -> None:
        """Change here what the step has changed there."""
        if traces.changes is not None:
            self._apply(self._step, traces.changes)
        self._module.trainer.should_stop = traces.should_stop
        for optimizer, groups in zip(self._module.trainer.optimizers, traces.groups or (), strict=False):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        for parameter, is_trained in zip(self._module.parameters(), traces.trained or (), strict=False):
            parameter.requires_grad_(is_trained)

    def _groups(self) -> list[list[dict[str, Any]]]:
        return [
            [{k: v for k, v in group.items() if k != "params" and isinstance(v, _SETTINGS)} for group in o.param_groups]
            for o in self._module.trainer.optimizers
        ]

    def trained(self) -> tuple[bool, ...]:
        """Return whether each parameter of the module is trained."""
        if self._parameters is None:
            self._parameters = list(self._module.parameters())
        return tuple(parameter.requires_grad for parameter in self._parameters)

    @contextmanager
    def undone(self, *, whole_step: bool = False) -> Iterator[None]:
        """Undo what a step changes in the module, which is run again, and then counts.

        Args:
            whole_step: Whether the step is run as a whole, and not only up to its model.
        """
        places = [(self._module, name) for name in vars(self._module).keys() & self._read_before()]
        modules = [self._module]
        if whole_step:
            of_layers = self._placement.ranks_of_modules()
            modules = [m for n, m in self._module.named_modules() if n not in of_layers and not isinstance(m, Metric)]
            places = [(m, name) for m in modules for name in vars(m) if m is not self._module or name not in _LIGHTNING]
        known = [set(vars(m)) for m in modules]
        before = [(m, name, vars(m)[name], _copied(vars(m)[name])) for m, name in places if name not in _INTERNAL]
        buffers = [
            (m, name, buffer, _copied(buffer))
            for m in modules
            for name, buffer in m.named_buffers(recurse=False)
            if whole_step or name in self._read_before()
        ]
        try:
            yield
        finally:
            for m, names in zip(modules, known, strict=True):
                for name in vars(m).keys() - names:
                    del m.__dict__[name]
            for m, name, value, copy in before:
                _undo(value, copy)
                m.__dict__[name] = value
            for m, name, buffer, copy in buffers:
                _undo(buffer, copy)
                if getattr(m, name) is not buffer:
                    setattr(m, name, buffer)

    # ---- an epoch --------------------------------------------------------------------------------------------------

    def equalise(self) -> None:
        """Give all ranks what the steps have changed in the module; every rank must call this at the same point."""
        if not self._has_run:
            return
        self._has_run = False
        with torch.inference_mode(False):
            gathered = all_gather(self._epoch.changes())
            for rank, changes in enumerate(gathered):
                if changes is not None and rank != self._rank:
                    self._apply(self._epoch, changes)
        for changes in gathered:
            if changes is not None and changes.refused:
                self._refuse(changes)

    def why_not_moved(self, modules: Collection[str]) -> str | None:
        """Return what keeps some submodules of this rank on it, given their names; None if they can move."""
        return self._epoch.unsendable(modules)

    def _apply(self, state: ModuleState, changes: Changes) -> None:
        with torch.inference_mode(False):
            state.apply(changes)

    def _refuse(self, changes: Changes) -> None:
        for (owner, name), reason in changes.refused.items():
            full = ".".join(part for part in ("self", owner, name) if part)
            text = f"`{full}`, which steps change, cannot be sent to the other ranks: {reason}."
            if name in self._read_in_hooks():
                raise UnsupportedFeatureError(
                    f"`hetero_pipeline` runs hooks on every rank, but {text} Keep values that can be pickled in it."
                )
            if (owner, name) not in self._warned:
                self._warned.add((owner, name))
                rank_zero_warn(f"`hetero_pipeline`: {text} Other ranks than 0 keep the value that they have.")

    def _known(self) -> Mapping[Any, Any]:
        trainer = trainer_of(self._module)
        if trainer is None:
            return {}
        found: dict[Any, Any] = {"trainer": trainer, "strategy": trainer.strategy}
        for kind in ("optimizers", "callbacks", "loggers", "lr_scheduler_configs"):
            found |= {(kind, number): value for number, value in enumerate(getattr(trainer, kind))}
        found |= {("scheduler", number): config.scheduler for number, config in enumerate(trainer.lr_scheduler_configs)}
        datamodule = getattr(trainer, "datamodule", None)
        return found if datamodule is None else {**found, "datamodule": datamodule}

    def _is_of_this_rank(self, name: str) -> bool:
        if self._ranks is None:
            self._ranks = self._placement.ranks_of_modules()
        return self._ranks.get(name, self._placement.plan.last_ranks[0]) == self._rank

    def _is_shared(self, buffer: Tensor) -> bool:
        return self._is_last and self._placement.is_shared(buffer)


def _copied(value: Any) -> Any:
    """Return what :func:`_undo` needs to undo changes of a value in place; None if such changes are not undone."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else (version_of(value), value.detach().clone())
    return value.copy() if type(value) in (list, dict, set) else None


def _undo(value: Any, copy: Any) -> None:
    if copy is None:
        return
    if isinstance(value, Tensor):
        version, before = copy
        if version_of(value) != version:
            with torch.no_grad():
                value.copy_(before)
    elif isinstance(value, list):
        value[:] = copy
    else:
        value.clear()
        value.update(copy)
