"""Keep ranks together while they run the same hook, also where only one of them does something in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_hetero.distributed.collectives import broadcast_from
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["Meeting"]

_END, _FORWARD, _TOGETHER, _VALUE = "end", "forward", "together", "value"


class Meeting:
    """What the rank of the last stage does in a hook, and the others do with it.

    Modules guard code by ``self.trainer.is_global_zero``. So before this rank does something for which it needs the
    others, it tells them what; they may be at the same line, or wait at the end of the hook.

    Args:
        leader: Rank of the last stage.
        leads: Whether this rank is ``leader``.
        run_forward: Function that runs the model on all ranks, given the arguments of the call.
    """

    def __init__(self, leader: int, run_forward: Callable[[Any], Any], *, leads: bool) -> None:
        self._leader = leader
        self._leads = leads
        self._run_forward = run_forward
        self._hooks: list[str] = []

    @property
    def is_on(self) -> bool:
        """Whether a hook is running in which the ranks keep together."""
        return bool(self._hooks)

    @contextmanager
    def of(self, hook: str) -> Iterator[None]:
        """Keep together in this context, until :meth:`end`."""
        self._hooks.append(hook)
        try:
            yield
        finally:
            self._hooks.pop()

    def end(self, message: Any) -> Any:
        """End the hook when every rank is here, and return the message of the leader."""
        return self._tell(_END, message) if self._leads else self._hear(_END)

    def value(self, value: Any) -> Any:
        """Return the leader's value, for which the others need not ask."""
        return self._tell(_VALUE, value) if self._leads else self._hear(_VALUE)

    def forward(self, arguments: Any) -> Any:
        """Run the model with the leader's arguments, on the others also if they do not call it."""
        return self._run_forward(self._tell(_FORWARD, arguments) if self._leads else self._hear(_FORWARD))

    def together(self) -> None:
        """Go on when every rank is here; those that are elsewhere raise an error."""
        if self.is_on:
            _ = self._tell(_TOGETHER, None) if self._leads else self._hear(_TOGETHER)

    def _tell(self, kind: str, message: Any) -> Any:
        broadcast_from((kind, message), self._leader)
        return message

    def _hear(self, awaited: str) -> Any:
        while True:
            told: Any = broadcast_from(None, self._leader)
            kind, message = told
            if kind == awaited:
                return message
            if kind == _FORWARD:
                self._run_forward(message)
            elif kind != _VALUE:
                raise UnsupportedFeatureError(
                    f"`hetero_pipeline` needs {self._hooks[-1]!r} to save checkpoints, to communicate and"
                    f" to call the model on all ranks, got a call that rank {self._leader} makes alone, or leaves out."
                    f" Remove the condition on the rank around it."
                )
