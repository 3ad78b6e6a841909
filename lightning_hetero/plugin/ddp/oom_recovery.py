"""Continue after a rank has run out of memory, with smaller micro-batches and without losing a step.

If memory runs out in a forward pass, or in the backward pass of an early micro-batch, no gradient has been communicated
yet, and the step runs again in smaller micro-batches. If it runs out in the last backward pass, the gradients computed
so far may be on their way to the peers. They are correct and stay. Only the gradients of the remaining parameters are
computed again, in smaller micro-batches and without DDP, and then given to autograd as if the interrupted pass had
computed them. If it runs out in a communication hook, the rank gives up: DDP does not send those gradients any more.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.balance.batch.caps import MicroBatchLimits, halved, micro_batch_sizes
from lightning_hetero.distributed.group.failure import announce
from lightning_hetero.distributed.torch_private import computes_in_buckets, copies_combined, reduces_after_backward
from lightning_hetero.exceptions import HeteroError, RankOutOfMemoryError, UnsupportedFeatureError
from lightning_hetero.plugin.common.protocols import StepOwner
from lightning_hetero.plugin.ddp.step_runner import StepRunner
from lightning_hetero.plugin.step.batch_size import samples_in
from lightning_hetero.plugin.step.gradients import (
    Gradients,
    accumulate_as_backward,
    added,
    kept_buffers,
    mark,
)
from lightning_hetero.plugin.step.log_capture import silent_log
from lightning_hetero.plugin.step.metrics import discarded_metrics
from lightning_hetero.plugin.step.out_of_memory import free_memory, is_out_of_memory

__all__ = ["BeforeBackward", "OutOfMemoryRecovery", "StepAttempt"]


@dataclass(frozen=True)
class StepAttempt:
    """A step between its forward pass and the backward pass of its last micro-batch.

    Attributes:
        args: Arguments of the user's step for the last micro-batch, the batch first.
        samples: Number of samples in the last micro-batch; 0 if they were not counted.
        weight: Weight of the last micro-batch's loss in the rank's loss, over one optimiser step.
        early_gradients: Gradients of the micro-batches before it.
    """

    args: tuple[Any, ...]
    samples: int
    weight: float
    early_gradients: Gradients


@dataclass(frozen=True)
class BeforeBackward:
    """State before a backward pass, which shows afterwards how far an interrupted pass has come.

    Attributes:
        parameters: Parameters that are trained.
        marks: One mark per parameter, which changes as soon as the parameter's gradient is accumulated.
        reduces_after: Whether DDP combines gradients after the pass rather than during it.
    """

    parameters: Sequence[nn.Parameter]
    marks: Sequence[tuple[int, int] | None]
    reduces_after: bool

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], model: nn.Module | None) -> BeforeBackward:
        """Note the state of the gradients of ``parameters``."""
        return cls(parameters, [mark(parameter) for parameter in parameters], reduces_after_backward(model))

    @property
    def untouched(self) -> list[nn.Parameter]:
        """The parameters whose gradients have not been computed since."""
        return [p for p, before in zip(self.parameters, self.marks, strict=True) if mark(p) == before]

    @property
    def touched(self) -> list[nn.Parameter]:
        """The parameters whose gradients have been computed since, as dense tensors."""
        untouched = set(self.untouched)
        dense = (p for p in self.parameters if p.grad is not None and p.grad.layout == torch.strided)
        return [p for p in dense if p not in untouched]


class OutOfMemoryRecovery:
    """Repeats work that did not fit into memory, on one rank.

    Args:
        strategy: The strategy whose steps are run.
        runner: The runner of these steps.
        limits: How large micro-batches may be; lowered if memory runs out.
    """

    def __init__(self, strategy: StepOwner, runner: StepRunner, limits: MicroBatchLimits) -> None:
        self._strategy = strategy
        self._runner = runner
        self._limits = limits

    def smaller(self, sizes: Sequence[int], where: str, reason: str, finished: int = 0) -> tuple[int, ...]:
        """Lower the limit after micro-batches that did not fit; return the sizes to try next.

        Args:
            sizes: Sizes of the micro-batches, in samples.
            where: The part of the step in which memory ran out.
            reason: Torch's error message.
            finished: Number of samples in the micro-batches that did fit. No new micro-batch mixes these samples with
                others.

        Raises:
            RankOutOfMemoryError: Smaller micro-batches do not help.
        """
        self._limits.times_out_of_memory += 1
        largest = max(sizes)
        if self._limits.why_one is not None:
            raise self.failure(where, self._limits.why_one, reason)
        if largest < 2:
            raise self.failure(where, "a single sample does not fit", reason)
        self._limits.limit = halved(largest)
        warnings.warn(
            f"`hetero_ddp`: rank {self._strategy.global_rank} ran out of memory in {where} with {largest} samples. The"
            f" step is repeated, and from now on a micro-batch has at most {self._limits.limit}. ({reason})",
            stacklevel=2,
        )
        free_memory(self._strategy.root_device)
        rest = sum(sizes) - finished
        return (*micro_batch_sizes(finished, self._limits.limit), *micro_batch_sizes(rest, self._limits.limit))

    # ---- an interrupted backward pass --------------------------------------------------------------------------------

    def finish_backward(self, attempt: StepAttempt | None, before: BeforeBackward, loss: Tensor, reason: str) -> Tensor:
        """Compute the gradients missing after an interrupted backward pass, and combine them with those of other ranks.

        Args:
            attempt: The interrupted step; None if it is unknown.
            before: State of the gradients before the pass.
            loss: The loss with which the pass began.
            reason: Torch's error message.

        Raises:
            RankOutOfMemoryError: Memory ran out, and smaller micro-batches do not help.
        """
        module, strategy = self._runner.module, self._strategy
        strategy.timer.backward_interrupted()
        if attempt is None or not module.automatic_optimization:
            raise self.failure("a backward pass", "only automatic optimisation can be repeated", reason)
        # the interrupted graph still holds memory, and Lightning holds the loss
        loss = loss.detach_()
        if not before.untouched:
            raise self.failure("the all-reduce", "what was communicated cannot be repeated", reason)
        if computes_in_buckets(strategy.model):
            why = "whether a communication hook has sent its gradients is unknown with `gradient_as_bucket_view=True`"
            raise self.failure("the backward pass", why, reason)
        computed = [(p, mark(p)) for p in before.touched]
        gradients = self._repeated(attempt, before.untouched, reason)
        strategy.timer.gradients_ready()
        try:
            accumulate_as_backward(gradients, strategy.model if before.reduces_after else None)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = "what was communicated cannot be repeated"
            raise self.failure("a communication hook", why, str(error)) from error
        # DDP sends no further bucket after one that a hook has not sent, and then combines no gradient
        if copies_combined(strategy.model) and any(mark(p) == earlier for p, earlier in computed):
            raise self.failure("a communication hook", "its gradients were not sent, which cannot be repeated", reason)
        loss = strategy.precision_plugin.post_backward(loss, module)
        strategy.post_backward(loss)
        return loss

    def _repeated(self, attempt: StepAttempt, parameters: Sequence[nn.Parameter], reason: str) -> Gradients:
        """Return the gradients of the last micro-batch, computed in smaller micro-batches that fit."""
        sizes: Sequence[int] = (attempt.samples or samples_in(attempt.args[0]),)
        while True:
            sizes = self.smaller(sizes, "the backward pass", reason)
            try:
                gradients = self._gradients(attempt, sizes, parameters)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise self.cannot_repeat("the backward pass", error, reason) from error
                reason = str(error)
            else:
                return [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]

    def _gradients(
        self, attempt: StepAttempt, sizes: Sequence[int], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor | None]:
        runner, module = self._runner, self._runner.module
        batch, *rest = attempt.args
        parts = runner.split(batch, sizes)
        found: list[Tensor | None] = [None] * len(parameters)
        with ExitStack() as stack:
            for context in (discarded_metrics(module), silent_log(module), kept_buffers(module)):
                stack.enter_context(context)
            for part, weight in zip(parts, runner.weights(parts, sizes), strict=True):
                output = runner.forward_without_ddp(part, *rest)
                gradients = runner.gradients_of(output, weight * attempt.weight, parameters)
                del output
                found = [added(old, new) for old, new in zip(found, gradients, strict=True)]
        return found

    # ---- giving up ---------------------------------------------------------------------------------------------------

    def cannot_repeat(self, where: str, error: Exception, reason: str) -> Exception:
        """Return the error to raise if the repetition of a step fails for another reason than memory."""
        if isinstance(error, HeteroError) and not isinstance(error, UnsupportedFeatureError):
            return error  # it already says what happened: this rank gave up, or a peer did
        return self.failure(where, f"its repetition in smaller micro-batches failed: {error}", reason)

    def failure(self, where: str, why: str, reason: str) -> RankOutOfMemoryError:
        """Return the error of a rank that gives up, and announce it to the peers."""
        strategy = self._strategy
        part = strategy.training_slice
        step, samples = (part.step, part.samples) if part else ("?", "?")
        # a strategy in which ranks must have equal numbers of micro-batches refuses `micro_batch_size`
        limits = "`max_batch_size`" if strategy.why_one_micro_batch else "`max_batch_size` or `micro_batch_size`"
        message = (
            f"Rank {strategy.global_rank} ({strategy.root_device}) ran out of memory in {where} of training step"
            f" {step} with {samples} sample{'' if samples == 1 else 's'}, and {why}. Lower the batch size, set"
            f" {limits}, or divide the model: `lightning-hetero plan` with `strategy: auto` says how. ({reason})"
        )
        announce(message)
        return RankOutOfMemoryError(message)
