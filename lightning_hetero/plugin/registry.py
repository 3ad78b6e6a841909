"""Register the strategies under the names that ``Trainer(strategy=...)`` takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn

from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy
from lightning_hetero.plugin.pipeline.strategy import HeteroPipelineStrategy

__all__ = ["register_strategies"]

# The same as in Lightning's own `ddp` family.
_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
_UNUSED_PARAMETERS: dict[str, dict[str, bool]] = {
    "": {},
    "_find_unused_parameters_false": {"find_unused_parameters": False},
    "_find_unused_parameters_true": {"find_unused_parameters": True},
}
# A second copy of Lightning with its own classes; this package's classes do not inherit from them.
_OTHER_STRATEGIES = "pytorch_lightning.strategies"


def register_strategies() -> None:
    """Register the ``hetero_ddp`` family and ``hetero_pipeline``; calling it again changes nothing.

    In the registry of ``pytorch_lightning`` these names raise a clear error, whichever package is imported first.
    """
    for launcher, start_method in _START_METHODS.items():
        for suffix, parameters in _UNUSED_PARAMETERS.items():
            name = f"hetero_ddp{launcher}{suffix}"
            StrategyRegistry.register(
                name,
                HeteroDDPStrategy,
                description=f"DDP for devices of unequal speed, started by {start_method!r} {parameters or ''}".strip(),
                override=True,
                start_method=start_method,
                **parameters,
            )
    for launcher in ("", "_spawn"):
        start_method = _START_METHODS[launcher]
        StrategyRegistry.register(
            f"hetero_pipeline{launcher}",
            HeteroPipelineStrategy,
            description=f"Layers split over devices in proportion to their speed, started by {start_method!r}",
            override=True,
            start_method=start_method,
        )
    other = sys.modules.get(_OTHER_STRATEGIES)
    if other is not None:
        _refuse_in(other)
    elif not any(isinstance(finder, _OtherFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OtherFinder())


class _OtherFinder(MetaPathFinder):
    """Waits for ``pytorch_lightning`` to be imported; importing it here would take too long for a message."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _OTHER_STRATEGIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_refuse(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _refuse_in(module)

            spec.loader.exec_module = execute_and_refuse  # type: ignore[method-assign]
        return spec


def _refuse_in(other: ModuleType) -> None:
    for name in StrategyRegistry:
        if name.startswith(("hetero_ddp", "hetero_pipeline")):
            other.StrategyRegistry.register(name, _refuse, description="see lightning.pytorch", override=True)


def _refuse(**_: Any) -> NoReturn:
    raise UnsupportedFeatureError(
        "`lightning_hetero` works with `lightning.pytorch`, got a Trainer of the separate package `pytorch_lightning`."
        " Replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl`."
    )
