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
    changed = _empty(mixin, type(loader))
    vars(changed).update(vars(copy.copy(loader)))
    vars(changed).update({LOADER_ITERATOR: None, **attributes})
    return changed


def _empty(mixin: type | None, cls: type[DataLoader[Any]]) -> DataLoader[Any]:
    changed_class = cls
    if mixin is not None and not issubclass(cls, mixin):

        def reduce(self: DataLoader[Any], protocol: int) -> Any:
            # no module has the class, so a copy, also one in another process, makes it again
            reduced: Any = super(changed_class, self).__reduce_ex__(protocol)
            return _empty, (mixin, cls), *reduced[2:]

        changed_class = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__reduce_ex__": reduce})
    loader: DataLoader[Any] = object.__new__(changed_class)
    return loader
