"""Warn of what plain DDP gets wrong silently, too, where it can be seen at little cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.plugin.common.overridden import overridden_method

__all__ = ["FrozenParameters", "LossTerms", "is_compiled", "warn_of_monitored"]


class FrozenParameters:
    """Warns if parameters are trained that were frozen when DDP wrapped the module.

    DDP combines the gradients of the parameters that required some then. All others follow each rank's own gradients,
    so the ranks' models diverge.

    Args:
        module: The module that is wrapped.
    """

    def __init__(self, module: nn.Module) -> None:
        self._frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}

    def warn(self) -> None:
        """Warn once, if some are trained now."""
        trained = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        if trained:
            self._frozen = {}
            rank_zero_warn(
                f"`hetero_ddp`: {len(trained)} parameters (such as {trained[0]!r}) are trained now, but were frozen"
                f" when DDP wrapped the module. As under `ddp`, it does not combine their gradients, so the"
                f" ranks' models diverge. Freeze them after that, for example in `on_train_start`, and use"
                f" `find_unused_parameters=True`."
            )


class LossTerms:
    """Warns if a loss looks like a mean over something else than samples: tokens, pixels, or targets that are masked.

    torch's losses over classes are observed in one step. Plain DDP averages the means of ranks, which is wrong if these
    are taken over different numbers of terms per sample.
    """

    def __init__(self) -> None:
        self._terms = 0

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Count the terms of the losses that are computed in this context."""
        functional: Any = nn.functional
        with ExitStack() as stack:
            for name in ("cross_entropy", "nll_loss"):
                stack.enter_context(overridden_method(functional, name, self._observe))
            yield

    def _observe(self, loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        target = args[1] if len(args) > 1 else kwargs.get("target")
        is_mean = kwargs.get("reduction", "mean") == "mean"
        if is_mean and isinstance(target, Tensor) and not target.is_floating_point():
            self._terms += int((target != kwargs.get("ignore_index", -100)).sum())
        return loss(*args, **kwargs)

    def warn(self, samples: int) -> None:
        """Warn if the ranks' losses have different numbers of terms per sample; all ranks call this together.

        Args:
            samples: Number of samples of this rank.
        """
        of_ranks = [(terms, n) for terms, n in all_gather((self._terms, samples)) if n]
        if len({terms / n for terms, n in of_ranks}) > 1:
            rank_zero_warn(
                f"`hetero_ddp`: the loss looks like a mean over terms that are not the samples, such as tokens: the"
                f" ranks have {[terms for terms, _ in of_ranks]} of them in {[n for _, n in of_ranks]} samples. The"
                f" mean over ranks is then not the mean over terms, under `ddp` neither. Pass a function that counts"
                f" them, HeteroDDPStrategy(num_loss_terms=...)."
            )


def is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile has compiled a part of ``module``: it compiles again if torch's functions change."""
    return any(
        type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def warn_of_monitored(trainer: Trainer) -> None:
    """Warn if a value that callbacks or schedulers monitor differs between ranks; all ranks call this together."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
    monitors = {getattr(callback, "monitor", None) for callback in callbacks}
    monitors |= {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    metrics = trainer.callback_metrics
    values = {name: float(metrics[name]) for name in sorted(n for n in monitors if isinstance(n, str) and n in metrics)}
    of_ranks = all_gather(values)
    for name in values:
        found = [rank.get(name, math.nan) for rank in of_ranks]
        if len({value for value in found if not math.isnan(value)}) > 1:
            rank_zero_warn(
                f"`hetero_ddp`: {name!r} is monitored, but differs between ranks:"
                f" {', '.join(f'{value:.4g}' for value in found)}. As under `ddp`, each rank follows the value of its"
                f" own samples: checkpoints are chosen by rank 0's, and schedulers may give the ranks different"
                f" learning rates. Log it with `self.log({name!r}, ..., sync_dist=True)`."
            )
