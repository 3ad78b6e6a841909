"""PyTorch Lightning on mixed hardware: every device gets work in proportion to its speed.

Importing this package registers its strategies, so that ``Trainer(strategy="hetero_ddp")`` finds them.
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

# The command needs no Lightning, whose import takes seconds. "-m" stands there while `python -m lightning_hetero`
# looks for its module.
if Path(sys.argv[0] if sys.argv else "").name not in {"lightning-hetero", "-m"}:
    from lightning_hetero.plugin.largest_batch import LargestBatchFinder
    from lightning_hetero.plugin.load_balancer import LoadBalancer
    from lightning_hetero.plugin.pipeline_recorder import PipelineRecorder
    from lightning_hetero.plugin.pipeline_strategy import HeteroPipelineStrategy
    from lightning_hetero.plugin.registry import register_strategies
    from lightning_hetero.plugin.strategy import HeteroDDPStrategy

    register_strategies()
