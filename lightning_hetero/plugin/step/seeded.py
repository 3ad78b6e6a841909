"""Draw the same random numbers on several ranks, whatever the state of their own generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["seeded"]


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed all random generators from ``numbers`` in this context, and restore their states afterwards."""
    seed = int(np.random.SeedSequence([abs(number) for number in numbers]).generate_state(1)[0])
    with isolate_rng():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # otherwise torch would record a traceback of each call
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
