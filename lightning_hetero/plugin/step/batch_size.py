"""Count the samples of a batch that this package has not collated itself."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size

from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["samples_in"]


def samples_in(batch: Any) -> int:
    """Return the length of the first dimension of the first tensor in ``batch``, as Lightning does for logging.

    Raises:
        UnsupportedFeatureError: If the batch holds no tensor.
    """
    try:
        samples = extract_batch_size(batch)
    except MisconfigurationException:
        samples = None
    if samples is None:
        raise UnsupportedFeatureError(
            f"The strategy must know how many samples a batch has, got a {type(batch).__name__!r} that holds no tensor."
            f" With `hetero_ddp`, pass HeteroDDPStrategy(num_loss_terms=...), which counts what the loss averages over;"
            f" with `hetero_pipeline`, collate the samples into tensors."
        )
    return samples
