"""PyTorch Lightning on mixed hardware: every device gets work in proportion to its speed.

Importing this package registers its strategies, so ``Trainer(strategy="hetero_ddp")`` finds them.
"""

import sys
from pathlib import Path

__all__ = [
    "HeteroDDPStrategy",
    "HeteroPipelineStrategy",
    "LargestBatchFinder",
    "LoadBalancer",
    "PipelineRecorder",
    "__version__",
]

__version__ = "0.1.0"


# The command `lightning-hetero` does not need Lightning, whose import takes seconds.
if Path(sys.argv[0] if sys.argv else "").name != "lightning-hetero":
    from lightning_hetero.plugin.balancing.largest_batch import LargestBatchFinder
    from lightning_hetero.plugin.balancing.load_balancer import LoadBalancer
    from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy
    from lightning_hetero.plugin.pipeline.recorder import PipelineRecorder
    from lightning_hetero.plugin.pipeline.strategy import HeteroPipelineStrategy
    from lightning_hetero.plugin.registry import register_strategies

    register_strategies()
