"""Change how a loader iterates, and leave everything else about it as it is."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import DataLoader

from lightning_hetero.distributed.data.pairing import library_class
from lightning_hetero.distributed.torch_private import LOADER_ITERATOR

__all__ = ["changed_loader"]


def changed_loader(
    loader: DataLoader[Any], mixin: type | None, below: type | None = None, **attributes: Any
) -> DataLoader[Any]:
    """Return a copy of ``loader`` whose class inherits from ``mixin`` first and then from the loader's class.

    What a user's class calls through ``super()`` is that of ``below``, and only then that of torch's class. A user's
    subclass keeps its methods. The dataset, workers, collate function, generator and all other settings are those of
    the original, which does not change. A newly constructed loader would need the original's arguments, which a
    subclass may not keep.

    Args:
        loader: Any DataLoader.
        mixin: A class that overrides methods of the loader's class; None to keep the loader's class.
        below: A class that overrides methods of torch's class; None for none.
        **attributes: Attributes of the copy, including those that a DataLoader refuses to change; it reads them again
            at each ``iter()``.
    """
    cls = type(loader)
    changed_class = cls
    if mixin is not None and not issubclass(cls, mixin):
        bases: tuple[type, ...] = (mixin, cls)
        if below is not None:
            library = library_class(loader)
            inner = type(library.__name__, (below, library), {"__module__": library.__module__})
            bases = (mixin, inner) if cls is library else (mixin, cls, inner)
        changed_class = type(cls.__name__, bases, {"__module__": cls.__module__})
    changed: DataLoader[Any] = object.__new__(changed_class)
    vars(changed).update(vars(copy.copy(loader)))
    vars(changed).update({LOADER_ITERATOR: None, **attributes})
    return changed
