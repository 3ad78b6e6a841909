"""Cut a batch of samples into smaller batches of the same structure."""

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

    Tensors whose first dimension counts the samples are cut, as views; so are lists with one entry a sample. Tuples,
    lists of such and mappings keep their structure; numbers, strings and tensors without dimensions are in each part.

    Args:
        batch: what a DataLoader has collated.
        sizes: samples of each part; together those of the batch.
        lists_are_fields: whether lists hold one entry a field, as ``torch.utils.data.default_collate`` makes them.
            Otherwise a list that could hold either is refused.

    Raises:
        UnsupportedFeatureError: it cannot be told which of its parts belong to which sample.
    """
    samples = sum(sizes)
    if not any(_counts(tensor, samples) for tensor in tensors_in(batch)):
        raise UnsupportedFeatureError(
            f"A batch is cut into passes along the first dimension of its tensors, got a {type(batch).__name__!r}"
            f" without a tensor whose first dimension is its {samples} samples. Lower the batch size, or collate the"
            f" samples into tensors."
        )
    ends = list(accumulate(sizes))
    spans = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [_Cut(start, end, samples, lists_are_fields).of(batch) for start, end in spans]


def _counts(tensor: Tensor, samples: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == samples


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Return the tensors in nested tuples, lists and mappings."""
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
                raise self._not_told(f"a tensor of shape {tuple(value.shape)}")
            return value[self.start : self.end]
        if isinstance(value, _WITHOUT_SAMPLES):
            return value
        if isinstance(value, Mapping):
            return self._of_mapping(value)
        if isinstance(value, list | tuple):
            return self._of_sequence(value)
        raise self._not_told(f"an object of type {type(value).__name__!r}")

    def _of_sequence(self, value: Any) -> Any:
        # default_collate leaves strings in a list of one a sample
        a_sample_each = len(value) == self.samples and (not self.lists_are_fields or isinstance(value[0], str | bytes))
        if a_sample_each and any(_counts(tensor, self.samples) for tensor in tensors_in(value)):
            # two samples of two fields, or three images of three channels: both would fit
            raise self._not_told(f"a {type(value).__name__} of {len(value)} entries of {len(value)}")
        if a_sample_each:
            return type(value)(value[self.start : self.end])
        parts = [self.of(entry) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)

    def _of_mapping(self, value: Mapping[Any, Any]) -> Any:
        parts = {key: self.of(entry) for key, entry in value.items()}
        if type(value) is dict:
            return parts
        if not isinstance(value, MutableMapping):
            raise self._not_told(f"a {type(value).__name__!r}, which cannot be written to")
        changed = copy.copy(value)
        changed.update(parts)
        return changed

    def _not_told(self, what: str) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            f"A batch is cut into passes along the first dimension of its tensors, got {what} in a batch of"
            f" {self.samples} samples: which part of it belongs to which sample cannot be told. Lower the batch size,"
            f" or have the collate function put what belongs to samples into tensors."
        )
