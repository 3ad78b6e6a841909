"""Change how a loader iterates, and leave everything else about it as it is."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import DataLoader

from lightning_hetero.distributed.torch_private import LOADER_ITERATOR

__all__ = ["changed_loader"]


def changed_loader(loader: DataLoader[Any], mixin: type | None, **attributes: Any) -> DataLoader[Any]:
    """Return a copy of ``loader`` whose class inherits from ``mixin`` first and then from the loader's class.

    A user's subclass keeps its methods. The dataset, workers, collate function, generator and all other settings are
    those of the original, which does not change. A newly constructed loader would need the original's arguments, which
    a subclass may not keep.

    Args:
        loader: Any DataLoader.
        mixin: A subclass of DataLoader that overrides some of its methods; None to keep the loader's class.
        **attributes: Attributes of the copy, including those that a DataLoader refuses to change; it reads them again
            at each ``iter()``.
    """
    cls = type(loader)
    changed_class = cls
    if mixin is not None and not issubclass(cls, mixin):
        changed_class = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
    changed: DataLoader[Any] = object.__new__(changed_class)
    vars(changed).update(vars(copy.copy(loader)))
    vars(changed).update({LOADER_ITERATOR: None, **attributes})
    return changed
