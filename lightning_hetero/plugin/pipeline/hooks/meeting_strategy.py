"""The collectives of ``hetero_pipeline`` within hooks, in which ranks first learn whether the others are there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from typing_extensions import override

from lightning_hetero.plugin.common.base_strategy import BaseStrategy

__all__ = ["MeetingStrategy"]


class MeetingStrategy(BaseStrategy):
    """A strategy whose collectives wait in hooks until every rank is there, or tell of those that are not."""

    @property
    @abstractmethod
    def runtime(self) -> Any:
        """The stages of the current run, or None."""

    def keep_together(self) -> None:
        """Go on when every rank is at the same point, if a hook is running."""
        if self.runtime is not None and not self.is_alone:
            self.runtime.hooks.meeting.together()

    @contextmanager
    def whole_model(self, *, gradients: bool = False) -> Iterator[None]:
        """Give every rank copies of the parameters and buffers of other ranks in this context.

        They are on the rank's device if it has much more free memory than they take, and on its host otherwise.
        What is changed in a copy is dropped; what every rank changes in the same way counts. Every rank must enter at
        the same point, outside of steps.

        Args:
            gradients: Whether parameters get their gradients too.
        """
        self.keep_together()
        with nullcontext() if self.runtime is None else self.runtime.placement.whole(gradients=gradients):
            yield

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self.keep_together()
        super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self.keep_together()
        return super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        self.keep_together()
        return super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self.keep_together()
        return super().reduce_boolean_decision(decision, all)
