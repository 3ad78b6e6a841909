"""Split a batch of samples into smaller batches of the same structure."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["split_batch", "tensors_in"]

_WITHOUT_SAMPLES = (str, bytes, int, float, complex, bool, type(None))


def split_batch(batch: Any, sizes: Sequence[int], *, lists_are_fields: bool = False) -> list[Any]:
    """Return batches of ``sizes`` samples each.

    Tensors whose first dimension counts the samples are split into views, and lists with one entry per sample are
    split too. Tuples, lists and mappings of these keep their structure; every part gets all numbers, strings and
    zero-dimensional tensors.

    Args:
        batch: A batch that a DataLoader has collated.
        sizes: Number of samples of each part; they add up to those of the batch.
        lists_are_fields: Whether lists hold one entry per field, as ``torch.utils.data.default_collate`` makes them.
            Otherwise a list that could have one entry per field or per sample is refused.

    Raises:
        UnsupportedFeatureError: If it is unclear which parts of the batch belong to which sample.
    """
    samples = sum(sizes)
    if not any(_counts(tensor, samples) for tensor in tensors_in(batch)):
        raise UnsupportedFeatureError(
            f"A batch is split into micro-batches along the first dimension of its tensors, got a"
            f" {type(batch).__name__!r} without a tensor whose first dimension is its {samples} samples. Lower the"
            f" batch size, or collate the samples into tensors."
        )
    ends = list(accumulate(sizes))
    spans = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [_Cut(start, end, samples, lists_are_fields).of(batch) for start, end in spans]


def _counts(tensor: Tensor, samples: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == samples


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


@dataclass(frozen=True)
class _Cut:
    start: int
    end: int
    samples: int
    lists_are_fields: bool

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0:
                return value
            if not _counts(value, self.samples):
                raise self._unclear(f"a tensor of shape {tuple(value.shape)}")
            return value[self.start : self.end]
        if isinstance(value, _WITHOUT_SAMPLES):
            return value
        if isinstance(value, Mapping):
            return self._of_mapping(value)
        if isinstance(value, list | tuple):
            return self._of_sequence(value)
        raise self._unclear(f"an object of type {type(value).__name__!r}")

    def _of_sequence(self, value: Any) -> Any:
        # default_collate leaves strings in a list with one entry per sample
        one_per_sample = len(value) == self.samples and (not self.lists_are_fields or isinstance(value[0], str | bytes))
        if one_per_sample and any(_counts(tensor, self.samples) for tensor in tensors_in(value)):
            # ambiguous: for example two samples of two fields
            raise self._unclear(f"a {type(value).__name__} of {len(value)} entries of {len(value)}")
        if one_per_sample:
            return type(value)(value[self.start : self.end])
        parts = [self.of(entry) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)

    def _of_mapping(self, value: Mapping[Any, Any]) -> Any:
        parts = {key: self.of(entry) for key, entry in value.items()}
        if type(value) is dict:
            return parts
        if not isinstance(value, MutableMapping):
            raise self._unclear(f"a {type(value).__name__!r}, which cannot be written to")
        changed = copy.copy(value)
        changed.update(parts)
        return changed

    def _unclear(self, what: str) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            f"A batch is split into micro-batches along the first dimension of its tensors, got {what} in a batch of"
            f" {self.samples} samples: it is unclear which part of it belongs to which sample. Lower the batch size,"
            f" or let the collate function put the samples' data into tensors."
        )
