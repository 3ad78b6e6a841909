"""Run a rank's part of a step in several passes, and in smaller ones where its memory runs out.

Gradients of all passes but the last are accumulated here, without communication; the last one's backward pass combines
them with those of the other ranks, so peers notice nothing but the time.  Lightning runs ``training_step``, sets
gradients to zero and calls ``backward``: the early passes run whole inside ``training_step``, their gradients are laid
aside and put back when ``backward`` begins.

Where memory runs out in a forward pass, or in the backward pass of an early one, nothing was communicated: the step is
run again in smaller passes.  Where it runs out in the last backward pass, the gradients that were already computed may
be on their way to the peers.  They are right and stay; only those of the remaining parameters are computed again, in
smaller passes and beside DDP, and then given to autograd as if the interrupted pass had found them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from torchmetrics import Metric

from lightning_hetero.balance.batch.caps import halved, micro_batch_sizes
from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.distributed.group.failure import announce
from lightning_hetero.exceptions import HeteroError, RankOutOfMemoryError, UnsupportedFeatureError
from lightning_hetero.plugin.ddp.stand_in import discarded_metrics, muted_gradients
from lightning_hetero.plugin.step.batch_size import samples_in
from lightning_hetero.plugin.step.gradients import (
    Gradients,
    accumulate_as_backward,
    added,
    kept_buffers,
    mark,
    put_back,
    reduces_at_the_end,
    taken_aside,
)
from lightning_hetero.plugin.step.log_capture import captured_log, silent_log
from lightning_hetero.plugin.step.out_of_memory import free_memory, is_out_of_memory
from lightning_hetero.plugin.step.split_batch import split_batch
from lightning_hetero.plugin.step.step_output import combined_output, detached_output, loss_of

if TYPE_CHECKING:
    from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy

__all__ = ["MicroBatches"]

Forward = Callable[..., Any]
Backward = Callable[..., Tensor]


@dataclass(frozen=True)
class _LastMicroBatch:
    """The pass whose gradients are still to be computed.

    Attributes:
        args: what the user's step was given.
        samples: its samples.
        weight: what its loss counts in that of the rank, in one optimiser step.
    """

    args: tuple[Any, ...]
    samples: int
    weight: float


class MicroBatches:
    """The passes of one rank.

    Args:
        strategy: whose steps they are.

    Attributes:
        limit: most samples that a pass may have; None for no limit. Lowered where memory runs out.
        predicted: most samples of a pass that are expected to fit; None where nothing is known.
        times_out_of_memory: how often it ran out.
    """

    def __init__(self, strategy: HeteroDDPStrategy) -> None:
        self._strategy = strategy
        self.limit: int | None = None
        self.predicted: int | None = None
        self.times_out_of_memory = 0
        self._aside: Gradients = []
        self._last: _LastMicroBatch | None = None
        self._finished_samples = 0
        self._is_in_several = False
        self._communicated = False
        self._buffers_are_broadcast = False
        self._all_parameters: tuple[nn.Parameter, ...] = ()
        self._why_one: str | None = None

    def begin(self) -> None:
        """A training begins: look at what is trained.

        Raises:
            UnsupportedFeatureError: the user asks for several passes, and steps cannot be run in several.
        """
        self._all_parameters = tuple(self._module.parameters())
        self._why_one = self._why_not()
        if self._strategy.micro_batch_size is not None and self._why_one is not None:
            raise UnsupportedFeatureError(
                f"`micro_batch_size` must be None here, because {self._why_one}; got {self._strategy.micro_batch_size}."
                f" Use `max_batch_size`, which limits the share itself."
            )

    def _why_not(self) -> str | None:
        """Return why a step cannot be run in several passes; None where it can."""
        module = self._module
        if not module.automatic_optimization:
            return "only automatic optimisation can be repeated in smaller passes"
        if any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules()):
            return "synchronised batch normalisation communicates in every pass"
        if any(isinstance(layer, Metric) and layer.dist_sync_on_step for layer in module.modules()):
            return "a metric with `dist_sync_on_step=True` communicates in every pass"
        return None

    def communicates(self) -> None:
        """The ranks communicate in the step at hand, so it cannot be repeated on one of them."""
        self._communicated = True

    def refuse_to_communicate(self, what: str) -> None:
        """Raise where the ranks may have different numbers of passes.

        Raises:
            UnsupportedFeatureError: the step at hand runs in several.
        """
        if self._is_in_several:
            message = (
                f"`{what}` cannot be called in a step that runs in several passes, since the ranks have different"
                f" numbers of them. Leave `micro_batch_size` out, or lower the batch size if memory ran out."
            )
            announce(f"rank {self._strategy.global_rank}: {message}")
            raise UnsupportedFeatureError(message)

    @property
    def most(self) -> int | None:
        """Most samples of a pass, for whatever reason; None for no limit."""
        if self._why_one is not None:
            return None
        return min((n for n in (self.limit, self.predicted) if n is not None), default=None)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def training_step(
        self, forward: Forward, backward: Backward, args: tuple[Any, ...], part: BatchSlice | None
    ) -> Any:
        """Run the user's step on ``args``, in as many passes as it takes.

        Args:
            forward: runs the user's step.
            backward: computes gradients of a loss.
            args: what the step is given; the batch first.
            part: the rank's part of the step; None where the loader says nothing about it.

        Returns:
            What the step would return for the whole batch.

        Raises:
            RankOutOfMemoryError: memory ran out and smaller passes are of no help.
        """
        self._aside, self._finished_samples, self._communicated = [], 0, False
        self._buffers_are_broadcast = False
        # counted only where it matters: a stand-in has one sample
        samples = part.samples or 1 if part is not None else (samples_in(args[0]) if self.most is not None else 0)
        sizes = micro_batch_sizes(samples, self.most)
        reason = ""
        while True:
            try:
                if len(sizes) < 2:
                    self._last = _LastMicroBatch(args, samples, 1.0 / self._accumulated_batches)
                    return self._forward(forward, *args)
                return self._several(forward, backward, args, sizes)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    if not reason:
                        raise
                    raise self._cannot_repeat("the forward pass", error, reason) from error
                reason = str(error)
            if self._communicated:
                raise self._failure("the forward pass", "the step had communicated before, as logging does", reason)
            samples = samples or samples_in(args[0])
            sizes = self._smaller(sizes or (samples,), "the forward pass", reason, self._finished_samples)
            if self._buffers_are_broadcast and isinstance(self._strategy.model, DistributedDataParallel):
                self._strategy.model.require_forward_param_sync = False  # peers do not broadcast theirs again

    def _several(self, forward: Forward, backward: Backward, args: tuple[Any, ...], sizes: Sequence[int]) -> Any:
        batch, *rest = args
        parts = self._split(batch, sizes)
        weights = self._weights(parts, sizes)
        ends = list(accumulate(sizes))
        outputs: list[Any] = []
        with self.alone(), taken_aside(self._parameters) as aside, captured_log(self._module) as log:
            for part, size, weight, end in zip(parts, sizes, weights, ends, strict=True):
                log.samples, log.weight = size, weight
                last = end == ends[-1]
                with self._counted_once(end):
                    output = self._forward(forward, part, *rest) if last else self._early_forward(forward, part, *rest)
                log.note_loss(loss_of(output))
                self._finished_samples = max(self._finished_samples, end)
                if not last:
                    self._early_backward(backward, output, weight / self._accumulated_batches)
                outputs.append(output if last else detached_output(output))
        self._aside = aside
        self._last = _LastMicroBatch((parts[-1], *rest), sizes[-1], weights[-1] / self._accumulated_batches)
        return combined_output(outputs, sizes, weights)

    def _forward(self, forward: Forward, *args: Any) -> Any:
        self._buffers_are_broadcast = True  # what DDP does first
        return forward(*args)

    # With a static graph, DDP counts every backward pass of the first step and expects as many in each from then on;
    # early passes are hidden from it there.

    @property
    def _is_static(self) -> bool:
        return getattr(self._strategy.model, "static_graph", False)

    def _early_forward(self, forward: Forward, *args: Any) -> Any:
        if self._is_static:
            return self._forward_beside_ddp(*args)
        with self._no_sync():
            return self._forward(forward, *args)

    def _early_backward(self, backward: Backward, output: Any, weight: float) -> None:
        """Accumulate the gradients of a pass on this rank."""
        if not self._is_static:
            with self._no_sync():
                backward(loss_of(output) * weight, None)
            return
        parameters = self._parameters
        for parameter, gradient in zip(parameters, self._gradients_of(output, weight, parameters), strict=True):
            parameter.grad = added(parameter.grad, gradient)

    def _forward_beside_ddp(self, *args: Any) -> Any:
        with self._strategy.precision_plugin.train_step_context():
            return self._module.training_step(*args)

    def _gradients_of(self, output: Any, weight: float, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
        """Return the gradients of a pass without any of DDP's hooks."""
        strategy = self._strategy
        loss = loss_of(output) * (weight * strategy.loss_weight)
        loss = strategy.precision_plugin.pre_backward(loss, self._module)
        with muted_gradients(parameters) if strategy.loss_weight == 0.0 else nullcontext():
            return torch.autograd.grad(loss, parameters, allow_unused=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run what is in this context on this rank alone: what communicates is refused."""
        self._is_in_several = True
        try:
            yield
        finally:
            self._is_in_several = False

    def _split(self, batch: Any, sizes: Sequence[int]) -> list[Any]:
        loader = self._strategy.trainer.train_dataloader
        return split_batch(batch, sizes, lists_are_fields=getattr(loader, "collate_fn", None) is default_collate)

    def _weights(self, parts: Sequence[Any], sizes: Sequence[int]) -> list[float]:
        """Return what each pass's loss counts in that of all of them."""
        strategy = self._strategy
        if strategy.loss_reduction == "sum":
            return [1.0] * len(parts)
        terms = [strategy.num_loss_terms(part) for part in parts] if strategy.num_loss_terms is not None else sizes
        return [n / max(sum(terms), 1) for n in terms]

    def _counted_once(self, end: int) -> AbstractContextManager[None]:
        """Discard what a repeated pass adds to metrics, if its samples were counted before."""
        return discarded_metrics(self._module) if end <= self._finished_samples else nullcontext()

    # ---- backward --------------------------------------------------------------------------------------------------

    def backward(self, backward: Backward, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradients of the last pass, and combine all with those of the other ranks.

        Args:
            backward: computes gradients of a loss.
            loss: the loss of the rank.
            *args: what ``backward`` is given besides.
            **kwargs: likewise.

        Raises:
            RankOutOfMemoryError: memory ran out and smaller passes are of no help.
        """
        put_back(self._aside)
        self._aside = []
        last, self._last = self._last, None
        parameters = self._parameters
        marks = [mark(parameter) for parameter in parameters]
        reduces_late = reduces_at_the_end(self._strategy.model)
        try:
            return backward(loss, *args, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        if last is None or not self._module.automatic_optimization:
            raise self._failure("a backward pass", "only automatic optimisation can be repeated", reason)
        # the rest of the interrupted graph holds memory, and Lightning holds the loss
        loss = loss.detach_()
        untouched = [p for p, before in zip(parameters, marks, strict=True) if mark(p) == before]
        if not untouched:
            raise self._failure("the all-reduce", "what was communicated cannot be repeated", reason)
        gradients = self._repeated(last, untouched, reason)
        self._strategy.timer.gradients_ready()
        accumulate_as_backward(gradients, self._strategy.model if reduces_late else None)
        loss = self._strategy.precision_plugin.post_backward(loss, self._module)
        self._strategy.post_backward(loss)
        return loss

    def _repeated(self, last: _LastMicroBatch, parameters: Sequence[nn.Parameter], reason: str) -> Gradients:
        """Return the gradients that an interrupted backward pass has not computed, in passes that fit."""
        sizes: Sequence[int] = (last.samples or samples_in(last.args[0]),)
        while True:
            sizes = self._smaller(sizes, "the backward pass", reason)
            try:
                gradients = self._gradients(last, sizes, parameters)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise self._cannot_repeat("the backward pass", error, reason) from error
                reason = str(error)
            else:
                return [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]

    def _gradients(
        self, last: _LastMicroBatch, sizes: Sequence[int], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor | None]:
        """Return the gradients of a pass with respect to some parameters, computed in smaller passes beside DDP."""
        module = self._module
        batch, *rest = last.args
        parts = self._split(batch, sizes)
        found: list[Tensor | None] = [None] * len(parameters)
        with ExitStack() as stack:
            for context in (discarded_metrics(module), silent_log(module), kept_buffers(module)):
                stack.enter_context(context)
            for part, weight in zip(parts, self._weights(parts, sizes), strict=True):
                output = self._forward_beside_ddp(part, *rest)
                gradients = self._gradients_of(output, weight * last.weight, parameters)
                del output
                found = [added(old, new) for old, new in zip(found, gradients, strict=True)]
        return found

    # ---- running out -----------------------------------------------------------------------------------------------

    def _smaller(self, sizes: Sequence[int], where: str, reason: str, finished: int = 0) -> tuple[int, ...]:
        """Lower the limit behind passes that did not fit; return the sizes to try next.

        Args:
            sizes: of the passes.
            where: in which part of the step that was.
            reason: what torch said.
            finished: the samples of the passes that did fit; no pass has some of these and some others.
        """
        self.times_out_of_memory += 1
        largest = max(sizes)
        if self._why_one is not None:
            raise self._failure(where, self._why_one, reason)
        if largest < 2:
            raise self._failure(where, "a single sample does not fit", reason)
        self.limit = halved(largest)
        warnings.warn(
            f"`hetero_ddp`: rank {self._strategy.global_rank} ran out of memory in {where} with {largest} samples; the"
            f" step is repeated, and from now on a pass has at most {self.limit}. ({reason})",
            stacklevel=2,
        )
        free_memory(self._strategy.root_device)
        return (*micro_batch_sizes(finished, self.limit), *micro_batch_sizes(sum(sizes) - finished, self.limit))

    def _cannot_repeat(self, where: str, error: Exception, reason: str) -> Exception:
        """Return what to raise where a step that ran out of memory fails in another way when it is repeated."""
        if isinstance(error, HeteroError) and not isinstance(error, UnsupportedFeatureError):
            return error  # says what happened: this rank gave up, or a peer did
        return self._failure(where, f"its repetition in smaller passes failed: {error}", reason)

    def _failure(self, where: str, why: str, reason: str) -> RankOutOfMemoryError:
        strategy = self._strategy
        part = strategy.training_slice
        message = (
            f"Rank {strategy.global_rank} ({strategy.root_device}) ran out of memory in {where} of training step"
            f" {part.step if part else '?'} with {part.samples if part else '?'} samples, and {why}. Lower the batch"
            f" size or set `max_batch_size` or `micro_batch_size`. ({reason})"
        )
        announce(message)
        return RankOutOfMemoryError(message)

    # ---- what belongs to the strategy --------------------------------------------------------------------------------

    @property
    def _module(self) -> Any:
        return self._strategy.lightning_module

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self._all_parameters if p.requires_grad]

    @property
    def _accumulated_batches(self) -> int:
        return self._strategy.trainer.accumulate_grad_batches if self._module.automatic_optimization else 1

    def _no_sync(self) -> AbstractContextManager[None]:
        model = self._strategy.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
