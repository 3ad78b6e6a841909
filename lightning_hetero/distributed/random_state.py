"""Save and restore the random state from which a loader draws its order, as values that fit into a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

__all__ = ["random_state", "restore_random_state"]


def random_state(loader: Any) -> dict[str, Any]:
    """Return the state of all random generators in this process that the samplers of ``loader`` may draw from.

    torch's states are tensors of bytes and the others are lists and numbers, so ``torch.load(weights_only=True)`` can
    read them.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "generators": [generator.get_state() for generator in _generators_of(loader)],
    }


def restore_random_state(loader: Any, state: Any) -> bool:
    """Restore a state from :func:`random_state`; if ``state`` is not one, return False and change nothing."""
    before, generators = random_state(loader), _generators_of(loader)
    try:
        _set(generators, state)
    except Exception:  # a checkpoint may hold anything, and each library raises its own errors
        _set(generators, before)
        return False
    return True


def _set(generators: list[torch.Generator], state: Any) -> None:
    for generator, own in zip(generators, state["generators"], strict=True):
        generator.set_state(own)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])


def _generators_of(loader: Any) -> list[torch.Generator]:
    """Return the generators that the user has given to a loader or to its samplers, each of them once.

    Args:
        loader: A loader, or a sampler of samples or of batches.
    """
    holders, found = [loader], {}
    for holder in holders:
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
        # Lightning wraps a user's sampler in a dataset, from which it then samples.
        inside = tuple(getattr(holder, name, None) for name in ("sampler", "batch_sampler", "batches"))
        if isinstance(holder, DistributedSampler):
            inside = (*inside, getattr(holder.dataset, "_sampler", None))
        holders += [one for one in inside if one is not None and all(one is not other for other in holders)]
    return [*found.values()]
