"""Change how a loader is iterated, and leave everything else of it as it is."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import DataLoader

from lightning_hetero.distributed.torch_private import LOADER_ITERATOR

__all__ = ["changed_loader"]


def changed_loader(loader: DataLoader[Any], mixin: type | None, **attributes: Any) -> DataLoader[Any]:
    """Return a copy of ``loader`` whose class inherits from ``mixin`` and then from the class of the loader.

    A user's subclass keeps its methods. Dataset, workers, collate function, generator and all other settings are those
    of the original, which does not change. Constructing a second loader instead would need arguments that a subclass
    may not keep.

    Args:
        loader: Any DataLoader.
        mixin: A class that derives from DataLoader and overrides methods of it; None for none.
        **attributes: Attributes of the copy, also those that DataLoader refuses to set; it reads them again at each
            ``iter()``.
    """
    cls = type(loader)
    changed_class = cls
    if mixin is not None and not issubclass(cls, mixin):
        changed_class = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
    changed: DataLoader[Any] = object.__new__(changed_class)
    vars(changed).update(vars(copy.copy(loader)))
    vars(changed).update({LOADER_ITERATOR: None, **attributes})
    return changed
