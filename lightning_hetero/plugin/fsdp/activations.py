"""Measure what the activations of this rank's samples take, for the weights of its next training."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision

from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.distributed.shards.activations import activations_of_example
from lightning_hetero.hardware.memory import MemoryMeter, MemoryUse

__all__ = ["Activations"]


class Activations:
    """What is known of activations; it outlives a training, so that the next one begins with it.

    Attributes:
        bytes_per_sample: What one sample takes on this rank; None if nothing is known.
        samples: How many samples each rank had at the end of the last training; None before the first.
    """

    def __init__(self) -> None:
        self.bytes_per_sample: float | None = None
        self.samples: Sequence[int] | None = None
        self._model = (0, 0)
        self._before: MemoryUse | None = None
        self._is_measured = False

    def begin_training(self, module: LightningModule, precision: Precision) -> float:
        """Begin a training, and return how many samples the module's example has; 0 if there is none.

        Args:
            module: The module, whole.
            precision: How it is trained.
        """
        model = (len([*module.modules()]), sum(p.numel() for p in module.parameters()))
        if model != self._model:  # what was measured belongs to another model
            self._model, self.bytes_per_sample, self.samples = model, None, None
        self._is_measured = False
        if self.bytes_per_sample is not None or (example := module.example_input_array) is None:
            return 0.0
        found = activations_of_example(module, example, precision.forward_context)
        if found is None:
            return 0.0
        self.bytes_per_sample = found[0] / found[1]
        return float(found[1])

    def begin_step(self, memory: MemoryMeter | None) -> None:
        """Measure the first training step; its peak is read by :meth:`end_forward`."""
        if memory is not None and not self._is_measured:
            self._is_measured = True
            memory.restart()
            self._before = memory.read()

    def end_forward(self, memory: MemoryMeter | None, whole_bytes: float, part: BatchSlice | None) -> None:
        """Find what the activations of the first step take: all of them are there before its backward pass.

        Args:
            memory: The meter; None if nothing is measured.
            whole_bytes: The largest memory that whole parameters have taken.
            part: This rank's part of the batch; None if that is unknown.
        """
        before, self._before = self._before, None
        use = memory.read() if memory is not None and before is not None else None
        if use is not None and before is not None and part is not None and part.samples:
            taken = use.peak_bytes - before.resident_bytes - whole_bytes
            self.bytes_per_sample = max(taken, 0.0) / part.samples
