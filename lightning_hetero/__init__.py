"""PyTorch Lightning on mixed hardware: every device gets work in proportion to its speed.

Importing this package registers its strategies, so that ``Trainer(strategy="hetero_ddp")`` finds them.
"""

import sys
from itertools import pairwise
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


def _is_command() -> bool:
    started = Path(sys.argv[0] if sys.argv else "").name
    # "-m" stands there while `python -m` looks for its module, be it this one or one of the user's
    return started == "lightning-hetero" or (started == "-m" and ("-m", __name__) in pairwise(sys.orig_argv))


# The command needs no Lightning, whose import takes seconds.
if not _is_command():
    from lightning_hetero.plugin.largest_batch import LargestBatchFinder
    from lightning_hetero.plugin.load_balancer import LoadBalancer
    from lightning_hetero.plugin.pipeline_recorder import PipelineRecorder
    from lightning_hetero.plugin.pipeline_strategy import HeteroPipelineStrategy
    from lightning_hetero.plugin.registry import register_strategies
    from lightning_hetero.plugin.strategy import HeteroDDPStrategy

    register_strategies()
