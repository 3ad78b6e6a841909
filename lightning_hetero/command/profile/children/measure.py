"""Time each layer of a model with two batches of unequal size, in the training of one step."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.command.plan.auto.model import Model, ModelLayer
from lightning_hetero.command.profile.output import Measured
from lightning_hetero.distributed.pipeline.layer_profile import LayerProfile, profile_layers
from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.hardware.memory import state_per_parameter
from lightning_hetero.plugin.step.batch_size import samples_in
from lightning_hetero.plugin.step.gradients import taken_aside

__all__ = ["measure"]


def measure(module: str, data: str | None, accelerator: str, precision: Any) -> Measured:
    """Return what each layer of a model takes.

    Args:
        module: Where the LightningModule is, as ``module:name``.
        data: Where its data are; None for its own ``train_dataloader``.
        accelerator: Lightning's name of the device.
        precision: Lightning's precision.

    Raises:
        ConfigurationError: Something cannot be found, or is not what it should be.
    """
    found = _module(module)
    if data is None and not is_overridden("train_dataloader", found, LightningModule):
        raise ConfigurationError(
            f"The training data must be known, but {module!r} has no `train_dataloader`: give `--data`."
        )
    given = {} if data is None else _data(data)
    strategy = _Profiling()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator=accelerator, devices=1, strategy=strategy, precision=precision, max_steps=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(found, **given)
    assert strategy.found is not None, "one step has been trained"
    return strategy.found


def _module(place: str) -> LightningModule:
    found = _imported(place, "MODULE:NAME")
    made = found() if callable(found) and not isinstance(found, LightningModule) else found
    if not isinstance(made, LightningModule):
        raise ConfigurationError(
            f"`MODULE:NAME` must be a LightningModule, or a function that returns one, got {type(made).__name__} from"
            f" {place!r}."
        )
    return made


def _data(place: str) -> dict[str, Any]:
    found = _imported(place, "--data")
    made = found() if callable(found) and not isinstance(found, LightningDataModule) else found
    if isinstance(made, LightningDataModule):
        return {"datamodule": made}
    if not hasattr(made, "__iter__"):
        raise ConfigurationError(
            f"`--data` must be a LightningDataModule, or a function that returns a loader, got {type(made).__name__}"
            f" from {place!r}."
        )
    return {"train_dataloaders": made}


def _imported(place: str, argument: str) -> Any:
    module, _, name = place.partition(":")
    if not module or not name:
        raise ConfigurationError(
            f"`{argument}` must be a module and a name in it, such as `my_module:Net`, got {place!r}."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"`{argument}` must be what Python can import, got {place!r}: {error}.") from None
    return found


class _Profiling(HeteroPipelineStrategy):
    """Times the layers before the first step.

    Attributes:
        found: What was measured; None before the first step.
    """

    def __init__(self) -> None:
        super().__init__(verbose=False)
        self.found: Measured | None = None

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.found is None:
            self.found = self._measured(args)
        return super().training_step(*args, **kwargs)

    def _measured(self, args: tuple[Any, ...]) -> Measured:
        running, module = self.runtime, self.lightning_module
        assert running is not None
        assert isinstance(module, LightningModule)
        samples = samples_in(args[0])
        if samples < 2:
            raise ConfigurationError(f"Batches must have at least two samples, got {samples}. Use a larger batch size.")
        running.verify(module.training_step, args, self.optimizers, self._context_of(training=True), training=True)
        profiles: list[LayerProfile] = []
        half = -(-samples // 2)
        aside = taken_aside(running.placement.parameters)
        with aside, running.steps.prepared(), self._context_of(training=True):
            for parts in (1, 2):
                example = running.steps.example(module.training_step, args, training=True, parts=parts)
                profiles.append(
                    profile_layers(
                        running.placement, running.found.calls, example.call, example.loss_of, self.root_device
                    )
                )
        whole, part = profiles
        layers = tuple(
            _layer(f"{number} {type(layer).__name__}", number, (samples, whole), (half, part))
            for number, layer in enumerate(running.found.layers)
        )
        states = max((state_per_parameter(optimizer) for optimizer in self.optimizers), default=0.0)
        return Measured(Model(layers, states), _name_of(self.root_device), samples)


def _layer(name: str, number: int, whole: tuple[int, LayerProfile], part: tuple[int, LayerProfile]) -> ModelLayer:
    (samples, one), (fewer, other) = whole, part

    def line(of_whole: float, of_part: float) -> tuple[float, float]:
        """Return the slope per sample and what remains without samples, neither negative."""
        slope = max((of_whole - of_part) / (samples - fewer), 0.0)
        overhead = max(of_whole - samples * slope, 0.0)
        return (of_whole - overhead) / samples, overhead

    forward_s, forward_overhead_s = line(one.forward_s[number], other.forward_s[number])
    backward_s, backward_overhead_s = line(one.backward_s[number], other.backward_s[number])
    return ModelLayer(
        forward_s,
        backward_s,
        forward_overhead_s,
        backward_overhead_s,
        float(one.parameter_bytes[number]),
        float(one.constant_bytes[number]),
        one.activations_bytes[number] / samples,
        one.boundary_bytes[number] / samples,
        name,
    )


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
