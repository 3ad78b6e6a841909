"""Call hooks before those of all callbacks, without changing the list of callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hetero.plugin.common.overridden import overridden_method

__all__ = ["listening_first", "logging_through"]


@contextmanager
def listening_first(trainer: Trainer, module: LightningModule, listener: Callback) -> Iterator[None]:
    """Call the hooks of ``listener`` first in this context.

    ``trainer.callbacks`` is the user's list: scripts take callbacks from it by their position. The hooks of the first
    callback are therefore preceded by those of the listener; without callbacks, the hooks of the module.

    Args:
        trainer: The Trainer that calls the hooks.
        module: The module that is run.
        listener: Object whose overridden hooks are called.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
    first, given = (callbacks[0], ()) if callbacks else (module, (trainer, module))
    with ExitStack() as stack:
        for name, hook in vars(type(listener)).items():
            if callable(hook) and hasattr(Callback, name) and hasattr(first, name) and not name.startswith("_"):
                stack.enter_context(overridden_method(first, name, partial(_preceded, getattr(listener, name), given)))
        yield


@contextmanager
def logging_through(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let the ``log`` of each callback call that of the module in this context, also where that is overridden.

    Lightning gives callbacks the method that the module has when a run begins.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
    with ExitStack() as stack:
        for callback in callbacks:
            if hasattr(callback, "log"):
                stack.enter_context(overridden_method(callback, "log", partial(_logged, module)))
        yield


def _logged(module: LightningModule, _: Any, *args: Any, **kwargs: Any) -> None:
    module.log(*args, **kwargs)


def _preceded(listen: Any, given: tuple[Any, ...], hook: Any, *args: Any, **kwargs: Any) -> Any:
    listen(*given, *args, **kwargs)
    return hook(*args, **kwargs)
