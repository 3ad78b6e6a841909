"""Register the strategies under the names that ``Trainer(strategy=...)`` takes."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from lightning.pytorch.strategies import StrategyRegistry

from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.pipeline_strategy import HeteroPipelineStrategy
from lightning_hetero.plugin.strategy import HeteroDDPStrategy

__all__ = ["register_strategies"]

# as Lightning's own `ddp` family
_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
_UNUSED_PARAMETERS: dict[str, dict[str, bool]] = {
    "": {},
    "_find_unused_parameters_false": {"find_unused_parameters": False},
    "_find_unused_parameters_true": {"find_unused_parameters": True},
}


def register_strategies() -> None:
    """Register the ``hetero_ddp`` family and ``hetero_pipeline``; calling it again changes nothing."""
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
            _refuse_in_pytorch_lightning(name)
    for launcher in ("", "_spawn"):
        start_method = _START_METHODS[launcher]
        StrategyRegistry.register(
            f"hetero_pipeline{launcher}",
            HeteroPipelineStrategy,
            description=f"Layers split over devices in proportion to their speed, started by {start_method!r}",
            override=True,
            start_method=start_method,
        )
        _refuse_in_pytorch_lightning(f"hetero_pipeline{launcher}")


def _refuse_in_pytorch_lightning(name: str) -> None:
    """Answer the name with a clear error in the registry of ``pytorch_lightning``, if that package is imported.

    It is a second copy of Lightning with classes of its own, which this package's are no subclasses of.
    """
    other = sys.modules.get("pytorch_lightning.strategies")
    if other is not None:
        other.StrategyRegistry.register(name, _refuse, description="see lightning.pytorch", override=True)


def _refuse(**_: Any) -> NoReturn:
    raise UnsupportedFeatureError(
        "`lightning_hetero` works with `lightning.pytorch`, got a Trainer of the separate package `pytorch_lightning`."
        " Replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl`."
    )
