"""Change how a loader iterates, and leave everything else about it as it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from lightning_hetero.distributed.data.pairing import library_class
from lightning_hetero.distributed.torch_private import LOADER_ITERATOR

__all__ = ["changed_loader", "follow_original"]

_ORIGINAL = "_hetero_original"


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
    changed = _empty(mixin, type(loader), below, library_class(loader))
    vars(changed).update(vars(copy.copy(loader)))
    own = {LOADER_ITERATOR: None, **attributes}
    vars(changed).update({**own, _ORIGINAL: _Original(loader, dict(vars(loader)), frozenset(own))})
    return changed


def _empty(
    mixin: type | None, cls: type[DataLoader[Any]], below: type | None, library: type[DataLoader[Any]]
) -> DataLoader[Any]:
    changed_class = cls
    if mixin is not None and not issubclass(cls, mixin):

        def reduce(self: DataLoader[Any], protocol: int) -> Any:
            # no module has the class, so a copy, also one in another process, makes it again
            reduced: Any = super(changed_class, self).__reduce_ex__(protocol)
            return _empty, (mixin, cls, below, library), *reduced[2:]

        bases: tuple[type, ...] = (mixin, cls)
        if below is not None:
            inner = type(library.__name__, (below, library), {"__module__": library.__module__})
            bases = (mixin, inner) if cls is library else (mixin, cls, inner)
        changed_class = type(cls.__name__, bases, {"__module__": cls.__module__, "__reduce_ex__": reduce})
    loader: DataLoader[Any] = object.__new__(changed_class)
    return loader


@dataclass(frozen=True)
class _Original:
    """The loader of which another is a copy.

    Attributes:
        loader: The original.
        known: Its attributes when the copy was made, and since then those that the copy has taken over.
        own: Names of attributes that the copy has for itself.
    """

    loader: DataLoader[Any]
    known: dict[str, Any]
    own: frozenset[str]


def follow_original(changed: DataLoader[Any]) -> None:
    """Give a copy of a loader the attributes that have been changed on its original; call it before an iteration.

    The user may hold the original, for example to set its epoch.
    """
    original: _Original | None = vars(changed).get(_ORIGINAL)
    if original is None:
        return
    follow_original(original.loader)
    for name, value in vars(original.loader).items():
        if name in original.own or name == _ORIGINAL:
            continue
        if name not in original.known or original.known[name] is not value:
            original.known[name] = value
            vars(changed)[name] = value
