"""PyTorch Lightning on mixed hardware: every device gets work in proportion to its speed.

Importing this package registers its strategies, so ``Trainer(strategy="hetero_ddp")`` finds them. Both the Trainer of
``lightning.pytorch`` and that of ``pytorch_lightning`` do, whichever package is imported first.
"""

from typing import TYPE_CHECKING, Any

from lightning_hetero import exceptions as exceptions
from lightning_hetero.lightning_packages import CLASSES, activate, package_in_use, register

if TYPE_CHECKING:
    from lightning_hetero.distributed.pipeline.units import register_layers
    from lightning_hetero.plugin.balancing.largest_batch import LargestBatchFinder
    from lightning_hetero.plugin.balancing.load_balancer import LoadBalancer
    from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy
    from lightning_hetero.plugin.fsdp.strategy import HeteroFSDPStrategy
    from lightning_hetero.plugin.pipeline.recorder import PipelineRecorder
    from lightning_hetero.plugin.pipeline.strategy import HeteroPipelineStrategy

__all__ = [
    "HeteroDDPStrategy",
    "HeteroFSDPStrategy",
    "HeteroPipelineStrategy",
    "LargestBatchFinder",
    "LoadBalancer",
    "PipelineRecorder",
    "__version__",
    "register",
    "register_layers",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Return what is public; of classes that Lightning uses, the one for the package of Lightning in this process."""
    if name == "register_layers":
        from lightning_hetero.distributed.pipeline.units import register_layers

        return register_layers
    if name in CLASSES:
        return package_in_use().public(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


activate()
