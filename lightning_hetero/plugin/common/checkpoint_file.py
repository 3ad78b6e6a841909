"""Write checkpoints that are complete or absent, whenever the process is killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_hetero.distributed.group.failure import finishing

__all__ = ["WholeFileCheckpointIO"]


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint next to its destination and renames it once it is on disk.

    Lightning writes a checkpoint to the system's temporary folder first. If that is another file system, the move is a
    copy, and a process that is killed meanwhile leaves half a file. Remote paths (``s3://``) are left to Lightning, and
    so are checkpoints that a user's own ``CheckpointIO`` writes.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        # One temporary name per destination, so the next save overwrites what a killed process has left.
        part = place.with_name(f".{place.name}.part")
        try:
            with finishing(), part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, place)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
