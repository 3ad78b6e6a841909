"""Split a batch of samples into smaller batches of the same structure."""

from __future__ import annotations

import copy
import datetime
import enum
import numbers
import sys
import types
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.step.containers import (
    attributes_of,
    comes_from,
    is_graph_batch,
    is_tensor_dict,
    tensors_in,
    with_attributes,
)

__all__ = ["split_batch", "tensors_in"]

_WITHOUT_SAMPLES = (
    str, bytes, bool, numbers.Number, type(None), np.generic, enum.Enum, PurePath, uuid.UUID, slice, type, torch.Size,
    torch.device, torch.dtype, torch.Generator, datetime.date, datetime.time, datetime.timedelta, types.FunctionType,
    types.BuiltinFunctionType,
)  # fmt: skip


def split_batch(batch: Any, sizes: Sequence[int], *, lists_are_fields: bool = False) -> list[Any]:
    """Return batches of ``sizes`` samples each.

    Tensors and arrays whose first dimension counts the samples are split into views, and lists with one entry per
    sample are split too. Tuples, lists, mappings, dataclasses, attrs classes and namespaces of these keep their
    structure; every part gets all numbers, strings, other values without samples, and zero-dimensional tensors. A
    TensorDict is indexed, and a batch of graphs of PyTorch Geometric is made again from its graphs.

    Args:
        batch: A batch that a DataLoader has collated.
        sizes: Number of samples of each part; they add up to those of the batch.
        lists_are_fields: Whether lists hold one entry per field, as ``torch.utils.data.default_collate`` makes them.
            Otherwise a list that could have one entry per field or per sample is refused.

    Raises:
        UnsupportedFeatureError: If it is unclear which parts of the batch belong to which sample.
    """
    samples = sum(sizes)
    if not _has_samples(batch, samples):
        raise UnsupportedFeatureError(
            f"A batch is split into micro-batches along the first dimension of its tensors, got a"
            f" {type(batch).__name__!r} without a tensor whose first dimension is its {samples} samples. Lower the"
            f" batch size, or collate the samples into tensors."
        )
    ends = list(accumulate(sizes))
    spans = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [_Cut(start, end, samples, lists_are_fields).of(batch) for start, end in spans]


def _counts(tensor: Tensor, samples: int) -> bool:
    return not tensor.is_nested and tensor.dim() > 0 and len(tensor) == samples


def _has_samples(value: Any, samples: int) -> bool:
    if is_graph_batch(value):
        return True
    if isinstance(value, Mapping) and not is_tensor_dict(value):
        return any(_has_samples(entry, samples) for entry in value.values())
    if isinstance(value, list | tuple):
        return any(_has_samples(entry, samples) for entry in value)
    return any(_counts(tensor, samples) for tensor in tensors_in(value))


@dataclass(frozen=True)
class _Cut:
    start: int
    end: int
    samples: int
    lists_are_fields: bool

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, _WITHOUT_SAMPLES):
            return value
        if isinstance(value, np.ndarray):
            return self._of_array(value)
        if is_tensor_dict(value):
            return self._of_tensor_dict(value)
        if comes_from(value, "torch_geometric"):
            return self._of_graphs(value)
        if isinstance(value, Mapping):
            return self._of_mapping(value)
        if isinstance(value, PackedSequence):
            raise self._unclear("a 'PackedSequence', which is ordered by time")
        if isinstance(value, list | tuple | range):
            return self._of_sequence(value)
        if isinstance(value, set | frozenset) and all(isinstance(entry, _WITHOUT_SAMPLES) for entry in value):
            return value
        attributes = attributes_of(value)
        if attributes is None:
            raise self._unclear(f"an object of type {type(value).__name__!r}")
        self._check_hidden(value, attributes)
        return with_attributes(value, {name: self.of(entry) for name, entry in attributes.items()})

    def _of_tensor(self, value: Tensor) -> Tensor:
        if value.dim() == 0:
            return value
        if not _counts(value, self.samples):
            shape = "nested" if value.is_nested else tuple(value.shape)
            raise self._unclear(f"a tensor of shape {shape}")
        return value[self.start : self.end]

    def _of_array(self, value: Any) -> Any:
        if value.ndim == 0:
            return value
        if len(value) != self.samples:
            raise self._unclear(f"an array of shape {value.shape}")
        return value[self.start : self.end]

    def _of_tensor_dict(self, value: Any) -> Any:
        if not value.batch_size or value.batch_size[0] != self.samples:
            raise self._unclear(f"a {type(value).__name__!r} with `batch_size` {list(value.batch_size)}")
        return value[self.start : self.end]

    def _of_graphs(self, value: Any) -> Any:
        name = type(value).__name__
        if not is_graph_batch(value) or value.num_graphs != self.samples:
            what = f"of {value.num_graphs} graphs" if is_graph_batch(value) else "that is no batch of graphs"
            raise self._unclear(f"a {name!r} {what}")
        graphs = value.to_data_list()[self.start : self.end]
        keys = set(value.keys())
        followed = [key[: -len("_batch")] for key in keys if key.endswith("_batch") and key[: -len("_batch")] in keys]
        part = sys.modules["torch_geometric.data"].Batch.from_data_list(graphs, follow_batch=followed)
        if set(part.keys()) != keys:
            raise self._unclear(f"a {name!r} with {sorted(keys - set(part.keys()))}, which its graphs do not have,")
        return part

    def _of_sequence(self, value: Any) -> Any:
        if hasattr(value, "_fields"):
            return type(value)(*(self.of(entry) for entry in value))
        # default_collate leaves strings in a list with one entry per sample
        one_per_sample = len(value) == self.samples and (not self.lists_are_fields or isinstance(value[0], str | bytes))
        if one_per_sample and any(_counts(tensor, self.samples) for tensor in tensors_in(value)):
            # ambiguous: for example two samples of two fields
            raise self._unclear(f"a {type(value).__name__} of {len(value)} entries of {len(value)}")
        if isinstance(value, range):
            return value[self.start : self.end] if one_per_sample else value
        if one_per_sample:
            return type(value)(value[self.start : self.end])
        return type(value)([self.of(entry) for entry in value])

    def _of_mapping(self, value: Mapping[Any, Any]) -> Any:
        parts = {key: self.of(entry) for key, entry in value.items()}
        if type(value) is dict:
            return parts
        if comes_from(value, "transformers") and hasattr(value, "encodings"):
            return self._of_encoding(value, parts)
        self._check_hidden(value, value)
        try:
            if not isinstance(value, MutableMapping):
                return self._rebuilt(lambda: type(value)(parts), parts)  # type: ignore[call-arg]
            return self._rebuilt(lambda: _assigned(copy.copy(value), parts), parts)
        except (TypeError, ValueError, AttributeError, NotImplementedError, KeyError):
            raise self._unclear(f"a {type(value).__name__!r}, which cannot be written to") from None

    @staticmethod
    def _rebuilt(make: Callable[[], Any], parts: dict[Any, Any]) -> Any:
        made = make()
        if [*made] != [*parts] or any(made[key] is not part for key, part in parts.items()):
            raise TypeError
        return made

    def _of_encoding(self, value: Any, parts: dict[Any, Any]) -> Any:
        """Return a ``BatchEncoding`` of transformers, with the tokeniser's own data of each sample."""
        encodings = value.encodings
        if encodings is not None and len(encodings) != self.samples:
            raise self._unclear(f"a {type(value).__name__!r} with {len(encodings)} encodings")
        own = None if encodings is None else encodings[self.start : self.end]
        return type(value)(parts, encoding=own, n_sequences=value.n_sequences)

    def _check_hidden(self, value: Any, known: Mapping[Any, Any]) -> None:
        """Refuse an object that holds tensors besides the entries or fields that are cut."""
        seen = {id(tensor) for entry in known.values() for tensor in tensors_in(entry)}
        hidden = [
            name
            for name, held in getattr(value, "__dict__", {}).items()
            if any(id(t) not in seen for t in tensors_in(held))
        ]
        if hidden:
            raise self._unclear(f"a {type(value).__name__!r} with tensors in {hidden}")

    def _unclear(self, what: str) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            f"A batch is split into micro-batches along the first dimension of its tensors, got {what} in a batch of"
            f" {self.samples} samples: it is unclear which part of it belongs to which sample. Lower the batch size,"
            f" or let the collate function put the samples' data into tensors."
        )


def _assigned(mapping: Any, parts: Mapping[Any, Any]) -> Any:
    for key, part in parts.items():  # one by one: transformers' outputs have no `update`
        mapping[key] = part
    return mapping
