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
    from lightning_hetero.plugin.balancing.largest_batch import LargestBatchFinder
    from lightning_hetero.plugin.balancing.load_balancer import LoadBalancer
    from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy
    from lightning_hetero.plugin.pipeline.recorder import PipelineRecorder
    from lightning_hetero.plugin.pipeline.strategy import HeteroPipelineStrategy
    from lightning_hetero.plugin.registry import register_strategies

    register_strategies()
