"""Look into the containers that batches are made of, and make others like them.

Libraries are recognised by their modules, which are loaded if an object comes from them, and used through their public
functions.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

__all__ = [
    "attributes_of",
    "comes_from",
    "is_graph_batch",
    "is_tensor_dict",
    "tensors_in",
    "with_attributes",
]


def comes_from(value: Any, library: str) -> bool:
    """Return whether an object's class is one of a library's or inherits from one."""
    return any(cls.__module__.split(".")[0] == library for cls in type(value).__mro__)


def is_tensor_dict(value: Any) -> bool:
    """Return whether a value is a TensorDict or a tensorclass, which are indexed as tensors are."""
    tensordict = sys.modules.get("tensordict")
    return tensordict is not None and bool(tensordict.is_tensor_collection(value))


def is_graph_batch(value: Any) -> bool:
    """Return whether a value is a batch of graphs of PyTorch Geometric."""
    return comes_from(value, "torch_geometric") and hasattr(value, "to_data_list") and hasattr(value, "num_graphs")


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the fields of a dataclass, of an attrs class or of a namespace; None for anything else."""
    if isinstance(value, type):
        return None
    if is_dataclass(value):
        names = [field.name for field in fields(value)]
    elif hasattr(type(value), "__attrs_attrs__"):
        names = [attribute.name for attribute in type(value).__attrs_attrs__]
    elif isinstance(value, SimpleNamespace):
        names = list(vars(value))
    else:
        return None
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def with_attributes(value: Any, attributes: Mapping[str, Any]) -> Any:
    """Return a copy of ``value`` with other attributes, also of a class whose objects do not change."""
    changed = copy.copy(value)
    for name, attribute in attributes.items():
        object.__setattr__(changed, name, attribute)
    return changed


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers: tuples, lists, sets, mappings, dataclasses, attrs classes and namespaces.

    Those of a TensorDict and of a graph are among them.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if is_tensor_dict(value):
        entries: Any = value.values(include_nested=True, leaves_only=True)
    elif isinstance(value, Mapping):
        entries = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        entries = value
    elif comes_from(value, "torch_geometric") and callable(getattr(value, "to_dict", None)):
        entries = value.to_dict().values()
    else:
        entries = (attributes_of(value) or {}).values()
    for entry in entries:
        yield from tensors_in(entry)
