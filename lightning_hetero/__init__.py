"""PyTorch Lightning on mixed hardware: every device gets work in proportion to its speed.

Importing this package registers its strategies, so ``Trainer(strategy="hetero_ddp")`` finds them.
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
    # sys.argv[0] is "-m" while `python -m` looks for its module, which may be this one or one of the user's.
    return started == "lightning-hetero" or (started == "-m" and ("-m", __name__) in pairwise(sys.orig_argv))


# The command does not need Lightning, whose import takes seconds.
if not _is_command():
    from lightning_hetero.plugin.balancing.largest_batch import LargestBatchFinder
    from lightning_hetero.plugin.balancing.load_balancer import LoadBalancer
    from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy
    from lightning_hetero.plugin.pipeline.recorder import PipelineRecorder
    from lightning_hetero.plugin.pipeline.strategy import HeteroPipelineStrategy
    from lightning_hetero.plugin.registry import register_strategies

    register_strategies()
