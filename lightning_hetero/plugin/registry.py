"""Register the strategies under the names that ``Trainer(strategy=...)`` takes."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy
from lightning_hetero.plugin.fsdp.strategy import HeteroFSDPStrategy
from lightning_hetero.plugin.pipeline.strategy import HeteroPipelineStrategy

__all__ = ["register_strategies"]

# The same as in Lightning's own `ddp` family.
_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
_UNUSED_PARAMETERS: dict[str, dict[str, bool]] = {
    "": {},
    "_find_unused_parameters_false": {"find_unused_parameters": False},
    "_find_unused_parameters_true": {"find_unused_parameters": True},
}


def register_strategies() -> None:
    """Register the ``hetero_ddp`` family, ``hetero_fsdp`` and ``hetero_pipeline``; calling it again changes nothing."""
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
            f"hetero_fsdp{launcher}",
            HeteroFSDPStrategy,
            description=f"Parameters in shards by memory, samples by speed, started by {start_method!r}",
            override=True,
            start_method=start_method,
        )
        StrategyRegistry.register(
            f"hetero_pipeline{launcher}",
            HeteroPipelineStrategy,
            description=f"Layers split over devices in proportion to their speed, started by {start_method!r}",
            override=True,
            start_method=start_method,
        )
