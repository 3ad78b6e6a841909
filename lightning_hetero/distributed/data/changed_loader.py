"""Change how a loader is iterated, and leave everything else of it as it is."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["changed_loader"]


def changed_loader(loader: DataLoader[Any], mixin: type | None, **attributes: Any) -> DataLoader[Any]:
    """Return a copy of ``loader`` whose class inherits from ``mixin`` and then from the class of the loader.

    Whatever a user's subclass does stays; dataset, workers, collate function, generator and all other settings are
    those of the original, which is left as it was.

    Args:
        loader: any DataLoader.
        mixin: a class that derives from DataLoader and overrides methods of it; None for none.
        **attributes: what is set on the copy, also where DataLoader refuses it. Constructing a second loader instead
            would need arguments that a subclass may not keep.
    """
    changed = copy.copy(loader)
    cls = type(loader)
    if mixin is not None and not issubclass(cls, mixin):
        # `__setattr__` of DataLoader refuses some of these; it reads them anew at each `iter()`
        object.__setattr__(changed, "__class__", type(cls.__name__, (mixin, cls), {"__module__": cls.__module__}))
    for name, value in {"_iterator": None, **attributes}.items():  # persistent workers of the original stay with it
        object.__setattr__(changed, name, value)
    return changed
