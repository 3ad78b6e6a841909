"""Count the samples of a batch that this package has not collated itself."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size

from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.step.containers import is_graph_batch, is_tensor_dict, tensors_in

__all__ = ["samples_in"]


def samples_in(batch: Any) -> int:
    """Return the length of the first dimension of the first tensor in ``batch``, as Lightning does for logging.

    A batch of graphs has one sample per graph, and a TensorDict says itself how many it has.

    Raises:
        UnsupportedFeatureError: If the batch holds no tensor.
    """
    samples = _samples(batch)
    if samples is None:
        raise UnsupportedFeatureError(
            f"The strategy must know how many samples a batch has, got a {type(batch).__name__!r} that holds no tensor."
            f" With `hetero_ddp`, pass HeteroDDPStrategy(num_loss_terms=...), which counts what the loss averages over;"
            f" with `hetero_pipeline`, collate the samples into tensors."
        )
    return samples


def _samples(batch: Any) -> int | None:
    if is_graph_batch(batch):
        return int(batch.num_graphs)
    if is_tensor_dict(batch):
        return int(batch.batch_size[0]) if batch.batch_size else None
    if isinstance(batch, list | tuple) and batch and (is_graph_batch(batch[0]) or is_tensor_dict(batch[0])):
        return _samples(batch[0])
    for tensor in tensors_in(batch):
        if not tensor.is_nested and tensor.dim():
            return len(tensor)
    try:
        return extract_batch_size(batch)  # looks into any iterable
    except MisconfigurationException:
        return None
