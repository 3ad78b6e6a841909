"""A LightningCLI that answers a wrong argument of this package with one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError

if TYPE_CHECKING:
    from jsonargparse import Namespace

__all__ = ["HeteroCLI"]

_USAGE_ERROR = 2


class HeteroCLI(LightningCLI):
    """LightningCLI that answers an invalid argument of this package with one line instead of a traceback.

    In everything else it behaves like LightningCLI. The classes of this package also work with LightningCLI itself,
    where the same line stands at the end of a traceback. Needs the extra ``lightning-hetero[cli]``.

    Args:
        args: Positional arguments of LightningCLI.
        kwargs: Keyword arguments of LightningCLI.

    Raises:
        SystemExit: With status 2, after the line, if a :class:`~lightning_hetero.exceptions.ConfigurationError` or
            :class:`~lightning_hetero.exceptions.UnsupportedFeatureError` was raised while the configuration was read or
            the subcommand ran.

    Example::

        from lightning_hetero.cli import HeteroCLI

        if __name__ == "__main__":
            HeteroCLI(MyModule, MyDataModule)

    Then run, for example, ``python train.py fit --trainer.strategy hetero_ddp``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except (ConfigurationError, UnsupportedFeatureError) as error:
            rank = getattr(rank_zero_only, "rank", 0)
            where = f" on rank {rank}" if rank else ""
            print(f"{Path(sys.argv[0]).name}: error{where}: {error}", file=sys.stderr)  # noqa: T201  # as argparse does
            raise SystemExit(_USAGE_ERROR) from None

    @override
    def before_instantiate_classes(self) -> None:
        from jsonargparse import ArgumentParser, Namespace  # if it is missing, LightningCLI has said what to install

        super().before_instantiate_classes()
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        for class_path, init_args in _own_classes(config.trainer):
            # The parser tries each type of `strategy: str | Strategy` and puts the errors of all into one long message.
            # Constructing the class alone gives only the error that matters.
            module, _, name = class_path.rpartition(".")
            parser = ArgumentParser()
            parser.add_class_arguments(getattr(import_module(module), name), "alone")
            parser.instantiate_classes(Namespace(alone=init_args))


def _own_classes(trainer: Namespace) -> Iterator[tuple[str, Namespace]]:
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    for given in (trainer.strategy, *callbacks):
        class_path = getattr(given, "class_path", "")
        if class_path.startswith("lightning_hetero."):
            yield class_path, given.init_args
