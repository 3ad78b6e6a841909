"""Close the process group before the interpreter shuts down.

gloo's threads may still hold tensors of the last collective when the interpreter shuts down, and then they abort the
process.  A training run that has finished would look like one that has failed, and torchrun would start it again
(https://github.com/pytorch/pytorch/pull/179291).
"""

from __future__ import annotations

import atexit
import sys
import threading

import torch.distributed as dist

__all__ = ["leave_group_at_exit", "stay_in_group"]

# A group whose peers are gone may wait for them until its time-out, which must not delay the end of this process.
_PATIENCE_S = 5.0


def leave_group_at_exit() -> None:
    """Close gloo's group when this process exits, since its training has succeeded; may be called more than once."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def stay_in_group() -> None:
    """Leave the group open when this process exits, since it has failed.

    Its peers wait for it. If the group were closed first, they would fail before this process has announced why.
    """
    atexit.unregister(_leave)


def _leave() -> None:
    failed = hasattr(sys, "last_type")
    if dist.is_initialized() and dist.get_backend() == "gloo" and not failed:
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(_PATIENCE_S)
