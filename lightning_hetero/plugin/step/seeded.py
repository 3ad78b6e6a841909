"""Random numbers that are the same on several ranks, wherever each of them is in its own."""

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
    """Draw in this context what follows from ``numbers``, and nothing from what is drawn outside of it."""
    seed = int(np.random.SeedSequence([abs(number) for number in numbers]).generate_state(1)[0])
    with isolate_rng():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # otherwise torch would note for each call when it was made
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
