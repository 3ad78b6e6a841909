"""Call hooks before those of all callbacks, without changing the list of callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping

from lightning_hetero.plugin.common.lightning_private import current_hook
from lightning_hetero.plugin.common.overridden import overridden_method

__all__ = ["listening_first", "logging_through"]


@contextmanager
def listening_first(trainer: Trainer, module: LightningModule, listener: Callback) -> Iterator[None]:
    """Call the hooks of ``listener`` first in this context.

    ``trainer.callbacks`` is the user's list: scripts take callbacks from it by their position, and change it while they
    run. The hooks of every callback and of the module are therefore preceded by those of the listener, which are called
    for the first of them only. Lightning calls the module's hooks after those of the callbacks. A hook that a callback
    calls itself, from another one of its hooks, is preceded by none.

    Args:
        trainer: The Trainer that calls the hooks.
        module: The module that is run.
        listener: Object whose overridden hooks are called.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
    with ExitStack() as stack:
        for name, hook in vars(type(listener)).items():
            if not callable(hook) or name.startswith("_") or not hasattr(Callback, name):
                continue
            once = _Once(name, getattr(listener, name), trainer, module)
            for callback in callbacks:
                # Lightning calls these after the module's
                monitors = name == "on_train_epoch_end" and isinstance(callback, EarlyStopping | Checkpoint)
                if not monitors:
                    stack.enter_context(overridden_method(callback, name, once.before_callback))
            if hasattr(module, name):
                stack.enter_context(overridden_method(module, name, once.before_module))
        yield


class _Once:
    """Calls a hook of the listener once, before the first of the hooks that Lightning calls together."""

    def __init__(self, name: str, listen: Any, trainer: Trainer, module: LightningModule) -> None:
        self._name = name
        self._listen = listen
        self._of_module = (trainer, module)
        self._module = module
        self._has_last = hasattr(module, name)
        self._called = False

    def before_callback(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._called and self._by_lightning():
            self._called = self._has_last
            self._listen(*args, **kwargs)
        return hook(*args, **kwargs)

    def before_module(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        if self._by_lightning():
            called, self._called = self._called, False
            if not called:
                self._listen(*self._of_module, *args, **kwargs)
        return hook(*args, **kwargs)

    def _by_lightning(self) -> bool:
        return current_hook(self._module) == self._name


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
