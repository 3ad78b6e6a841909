"""Run a rank's mini-batch in several micro-batches, and in smaller ones if its memory runs out.

The gradients of all micro-batches but the last are accumulated locally, without communication. The backward pass of the
last one combines them with those of the other ranks, so the peers notice nothing but the time. Lightning runs
``training_step``, sets the gradients to zero and calls ``backward``. The early micro-batches therefore run completely
inside ``training_step``; their gradients are set aside and put back when ``backward`` begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_hetero.balance.batch.caps import MicroBatchLimits, micro_batch_sizes
from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.distributed.group.failure import announce
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common.overridden import overridden
from lightning_hetero.plugin.common.protocols import StepOwner
from lightning_hetero.plugin.ddp.oom_recovery import BeforeBackward, OutOfMemoryRecovery, StepAttempt
from lightning_hetero.plugin.ddp.step_runner import StepRunner
from lightning_hetero.plugin.step.batch_size import samples_in
from lightning_hetero.plugin.step.gradients import added, muted_gradients, put_back, taken_aside
from lightning_hetero.plugin.step.log_capture import LogCapture, captured_log
from lightning_hetero.plugin.step.metrics import discarded_metrics
from lightning_hetero.plugin.step.out_of_memory import is_out_of_memory
from lightning_hetero.plugin.step.step_output import combined_output, detached_output, loss_of

__all__ = ["MicroBatches"]

Forward = Callable[..., Any]
Backward = Callable[..., Tensor]


@dataclass
class _Progress:
    """How far the current step has come, over all its attempts.

    Attributes:
        finished_samples: Number of samples in micro-batches that have finished.
        communicated: Whether the ranks have communicated, so that one of them cannot repeat the step.
        buffers_are_broadcast: Whether DDP has broadcast the module's buffers, which it does once per step.
    """

    finished_samples: int = 0
    communicated: bool = False
    buffers_are_broadcast: bool = False


class MicroBatches:
    """The micro-batches of one rank.

    Args:
        strategy: The strategy whose steps are run.
        limits: How large micro-batches may be; lowered if memory runs out.

    Attributes:
        before_communication: Function that is called before the ranks communicate in a step.
        part_of_rank: Part of this rank's samples that the current micro-batch has.
    """

    def __init__(self, strategy: StepOwner, limits: MicroBatchLimits) -> None:
        self._strategy = strategy
        self.part_of_rank = 1.0
        self._limits = limits
        self._is_alone = False
        self._refusal = ""
        self._progress = _Progress()
        self._attempt: StepAttempt | None = None
        self._log: LogCapture | None = None
        self._runner: StepRunner | None = None
        self.before_communication: Callable[[], None] = _nothing

    def begin(self) -> None:
        """Check whether steps can run in several micro-batches; called when a training begins.

        Raises:
            UnsupportedFeatureError: The user asks for several micro-batches, but steps cannot run in several.
        """
        self._runner = StepRunner(self._strategy)
        why_one = self._limits.why_one = self._runner.why_one()
        if self._strategy.micro_batch_size is not None and why_one is not None:
            raise UnsupportedFeatureError(
                f"`micro_batch_size` must be None here, because {why_one}; got {self._strategy.micro_batch_size}."
                f" Use `max_batch_size`, which limits the mini-batch itself."
            )

    def note_communication(self) -> None:
        """Note that the ranks communicate in the current step, so it cannot be repeated on one of them."""
        self._progress.communicated = True

    def before_collective(self, what: str) -> None:
        """Prepare for the ranks to communicate in the current step; raise as :meth:`refuse_to_communicate` does."""
        self.refuse_to_communicate(what)
        self.note_communication()

    def refuse_to_communicate(self, what: str) -> None:
        """Raise if the ranks may have different numbers of micro-batches.

        Args:
            what: Name of the method that would communicate.

        Raises:
            UnsupportedFeatureError: The current step runs in several micro-batches, or as :meth:`alone` says.
        """
        if self._is_alone:
            message = self._refusal or (
                f"`{what}` cannot be called in a step that runs in several micro-batches, because the ranks have"
                f" different numbers of them. Leave `micro_batch_size` out, or lower the batch size if memory ran out."
            )
            announce(f"rank {self._strategy.global_rank}: {message}")
            raise UnsupportedFeatureError(message)
        self.before_communication()

    @contextmanager
    def alone(self, refusal: str = "") -> Iterator[None]:
        """Run the code in this context on this rank alone, and refuse calls that communicate.

        Args:
            refusal: Why they are refused; by default because of the micro-batches.
        """
        self._is_alone, self._refusal = True, refusal
        try:
            yield
        finally:
            self._is_alone, self._refusal = False, ""

    @property
    def _steps(self) -> StepRunner:
        if self._runner is None:
            self._runner = StepRunner(self._strategy)
        return self._runner

    @property
    def _recovery(self) -> OutOfMemoryRecovery:
        return OutOfMemoryRecovery(self._strategy, self._steps, self._limits)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def training_step(
        self, forward: Forward, backward: Backward, args: tuple[Any, ...], part: BatchSlice | None
    ) -> Any:
        """Run the user's step on ``args``, in as many micro-batches as needed.

        Args:
            forward: Function that runs the user's step.
            backward: Function that computes the gradients of a loss.
            args: Arguments of the step, the batch first.
            part: The rank's part of the global batch; None if its loader does not tell.

        Returns:
            The output that the step would return for the whole mini-batch.

        Raises:
            RankOutOfMemoryError: Memory ran out, and smaller micro-batches do not help.
        """
        self._progress, self._attempt, self._log = _Progress(), None, None
        # count samples only if the number matters; a stand-in, which is small, is cut only if it does not fit
        most = self._limits.most
        samples = part.samples if part is not None else (samples_in(args[0]) if most is not None else 0)
        sizes = micro_batch_sizes(samples, most)
        reason = ""
        while True:
            try:
                if len(sizes) < 2:
                    self._attempt = StepAttempt(args, samples, 1.0 / self._steps.accumulated_batches, [])
                    return self._forward(forward, *args)
                return self._several(forward, backward, args, sizes)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    if not reason:
                        raise
                    raise self._recovery.cannot_repeat("the forward pass", error, reason) from error
                reason = str(error)
            if self._progress.communicated:
                why = "the step had already communicated, for example to log"
                raise self._recovery.failure("the forward pass", why, reason)
            samples = samples or samples_in(args[0])
            finished = self._progress.finished_samples
            sizes = self._recovery.smaller(sizes or (samples,), "the forward pass", reason, finished)
            if self._progress.buffers_are_broadcast and isinstance(self._strategy.model, DistributedDataParallel):
                self._strategy.model.require_forward_param_sync = False  # peers do not broadcast theirs again

    def _several(self, forward: Forward, backward: Backward, args: tuple[Any, ...], sizes: Sequence[int]) -> Any:
        steps, progress = self._steps, self._progress
        batch, *rest = args
        parts = steps.split(batch, sizes)
        weights = steps.weights(parts, sizes)
        ends = list(accumulate(sizes))
        outputs: list[Any] = []
        # what was logged is logged when the ranks may communicate again
        with (
            captured_log(steps.module) as log,
            self.alone(),
            overridden(self, "part_of_rank", 1.0),
            taken_aside(steps.parameters) as early_gradients,
        ):
            for part, size, weight, end in zip(parts, sizes, weights, ends, strict=True):
                log.samples, log.weight = size, weight
                self.part_of_rank = size / ends[-1]
                last = end == ends[-1]
                with self._counted_once(end):
                    output = self._forward(forward, part, *rest) if last else self._early_forward(forward, part, *rest)
                log.note_loss(loss_of(output))
                progress.finished_samples = max(progress.finished_samples, end)
                if not last:
                    with log.backward_pass():
                        self._early_backward(backward, output, weight / steps.accumulated_batches)
                outputs.append(output if last else detached_output(output))
        weight = weights[-1] / steps.accumulated_batches
        self._attempt = StepAttempt((parts[-1], *rest), sizes[-1], weight, early_gradients)
        self._log = log
        return combined_output(outputs, sizes, weights)

    def _forward(self, forward: Forward, *args: Any) -> Any:
        self._progress.buffers_are_broadcast = True  # DDP does this first
        return forward(*args)

    def _early_forward(self, forward: Forward, *args: Any) -> Any:
        if self._steps.is_static:
            return self._steps.forward_without_ddp(*args)
        with self._steps.no_sync():
            return self._forward(forward, *args)

    def _early_backward(self, backward: Backward, output: Any, weight: float) -> None:
        """Accumulate the gradients of a micro-batch on this rank."""
        steps = self._steps
        if not steps.is_static:
            with steps.no_sync(), self._muted(weight):
                backward(steps.weighted_loss(output, weight), None)
            return
        parameters = steps.parameters
        for parameter, gradient in zip(parameters, steps.gradients_of(output, weight, parameters), strict=True):
            parameter.grad = added(parameter.grad, gradient)

    def _muted(self, weight: float) -> AbstractContextManager[None]:
        """Replace gradients by zeros if the micro-batch has no loss terms, so that its loss may not be a number."""
        return nullcontext() if weight else muted_gradients(self._steps.parameters)

    def _counted_once(self, end: int) -> AbstractContextManager[Any]:
        """Discard what a repeated micro-batch adds to metrics if its samples were already counted."""
        repeated = end <= self._progress.finished_samples
        return discarded_metrics(self._steps.module) if repeated else nullcontext()

    # ---- backward --------------------------------------------------------------------------------------------------

    def backward(self, backward: Backward, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradients of the last micro-batch, and combine all gradients with those of the other ranks.

        Args:
            backward: Function that computes the gradients of a loss.
            loss: The rank's loss.
            *args: Further positional arguments of ``backward``.
            **kwargs: Further keyword arguments of ``backward``.

        Raises:
            RankOutOfMemoryError: Memory ran out, and smaller micro-batches do not help.
        """
        attempt, self._attempt = self._attempt, None
        log, self._log = self._log, None
        put_back([] if attempt is None else attempt.early_gradients)
        before = BeforeBackward.of(self._steps.parameters, self._strategy.model)
        try:
            muted = self._muted(1.0 if attempt is None else attempt.weight)
            with muted, nullcontext() if log is None else log.completed_in(self._steps.module, loss):
                return backward(loss, *args, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        return self._recovery.finish_backward(attempt, before, loss, reason)


def _nothing() -> None:
    """Do nothing."""
