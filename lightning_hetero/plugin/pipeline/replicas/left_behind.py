"""Refuse training steps that leave something in the module, of which each replica would have another version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.distributed.module_state import ModuleState
from lightning_hetero.distributed.pipeline.placement import TensorPlacement
from lightning_hetero.distributed.torch_private import BatchNorm, version_of
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.pipeline.hooks.names_read import names_read
from lightning_hetero.plugin.pipeline.refusals import refuse_one_pipeline
from lightning_hetero.plugin.pipeline.replicas.seat import Seat

__all__ = ["LeftBehind"]

_FIRST_STEPS, _EVERY = 3, 50
_OF_LIGHTNING = frozenset(vars(LightningModule())) | {"log"}  # which is overridden in a step
_WAY_OUT = "Use `replicas=1`, or return it from the step and collect it in `on_train_batch_end`."


class LeftBehind:
    """Compares the attributes and buffers of the module before and after some of the training steps.

    Replicas compare with each other after the first steps, and later after one of many, because that takes time. After
    the others, each rank that computes losses looks at the few modules that are in no layer, at the attributes that the
    code of the step mentions.

    Args:
        module: The user's LightningModule.
        placement: Where the parts of the model live.
        seat: The place of this rank among the replicas.
        rank: This rank.
        device: This rank's device.
    """

    def __init__(
        self, module: LightningModule, placement: TensorPlacement, seat: Seat, rank: int, device: torch.device
    ) -> None:
        self._module = module
        self._seat = seat
        self._steps = 0
        parts = {id(part): name for name, part in module.named_modules()}
        of_layers = set(placement.ranks_of_modules())
        own = {parts[id(p)] for layer in placement.own_layers for p in layer.modules() if id(p) in parts}
        of_metrics = {id(p) for m in module.modules() if isinstance(m, Metric | MetricCollection) for p in m.modules()}
        metrics = {name for key, name in parts.items() if key in of_metrics}
        is_last = rank == (seat.leader, *seat.others)[seat.number]
        self._of_layers = of_layers
        known = partial(_known, module)
        self._state = ModuleState(
            module,
            device,
            known,
            _OF_LIGHTNING,
            lambda name: name not in metrics and (name in own if name in of_layers else is_last),
            lambda _: False,
        )
        self._outside = ModuleState(
            module,
            device,
            known,
            _OF_LIGHTNING,
            lambda name: is_last and name not in metrics and name not in of_layers,
            lambda _: is_last,
        )
        self._mentioned = frozenset(names_read([module.training_step], module)) or None
        self._owns = placement.owns
        self._metrics = metrics
        self._norms = [part for part in module.modules() if isinstance(part, BatchNorm)]

    def refuse_one_pipeline(self) -> None:
        """Refuse what only one pipeline can train; every rank raises the error.

        Raises:
            UnsupportedFeatureError: There is such a thing.
        """
        if self._is_due or any(part.training for part in self._norms):  # layers may be thawed later
            refuse_one_pipeline(self._module)

    @property
    def _is_due(self) -> bool:
        return self._steps < _FIRST_STEPS or self._steps % _EVERY == 0

    @contextmanager
    def compared(self, samples: Sequence[int], refuse: Callable[[str], None]) -> Iterator[None]:
        """Compare what there is before and after the passes of a step in this context.

        Args:
            samples: Numbers of this replica's micro-batches; it has no samples if there are none.
            refuse: Refuses the step on every rank when it is over, with a message.

        Raises:
            UnsupportedFeatureError: Something has changed; raised on every rank.
        """
        due = self._is_due
        self._steps += 1
        if not due:
            self._outside.begin(self._mentioned)
            yield
            changed, gone = self._outside.changed(self._mentioned)
            if changed or gone:
                refuse(_changes(_full_name((changed + gone)[0]), "an attribute"))
            return
        self._outside.refresh()  # a hook may have replaced submodules
        self._state.refresh()
        self._state.begin()
        buffers = self._buffers()
        yield
        now = self._buffers()
        changed_buffers = [
            name for name, (_, version) in now.items() if name not in buffers or buffers[name][1] != version
        ]
        found = all_gather((bool(samples), self._seat.number, changed_buffers, self._state.digests_of_changes()))
        self._refuse(found)

    def _buffers(self) -> dict[str, tuple[Tensor, Any]]:
        """Return the buffers that live here, with a number that changes with each; the tensors stay alive with them."""
        return {
            name: (buffer, (id(buffer), 0 if buffer.is_inference() else version_of(buffer)))
            for name, buffer in self._module.named_buffers()
            if self._owns(buffer) and name.rpartition(".")[0] not in self._metrics
        }

    def _refuse(self, found: Sequence[tuple[bool, int, list[str], dict[Any, bytes | None]]]) -> None:
        for _, _, buffers, _ in found:
            if buffers:
                raise UnsupportedFeatureError(_changes(buffers[0], "a buffer"))
        trained = {number for has_samples, number, _, _ in found if has_samples}
        of_replicas: dict[Any, dict[int, bytes | None]] = {}
        for has_samples, number, _, digests in found:
            for place, digest in digests.items() if has_samples else ():
                of_replicas.setdefault(place, {})[number] = digest
        for (owner, name), digests in of_replicas.items():
            # a layer may keep what it has looked up, if it is the same everywhere
            alike = digests.keys() == trained and len({*digests.values()}) == 1 and None not in digests.values()
            if owner not in self._of_layers or not alike:
                raise UnsupportedFeatureError(_changes(_full_name((owner, name)), "an attribute"))


def _known(module: LightningModule) -> dict[Any, Any]:
    return {"trainer": module.trainer, "strategy": module.trainer.strategy}


def _full_name(place: tuple[str, str]) -> str:
    return ".".join(part for part in place if part)


def _changes(name: str, what: str) -> str:
    return (
        f"`hetero_pipeline` with `replicas` cannot train with steps that change {what} of the module, of which each"
        f" replica would have another version, got {name!r}. {_WAY_OUT}"
    )
