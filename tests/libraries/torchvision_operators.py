"""Let torchvision be imported beside a torch that it was not built for.

The torchvision of PyPI is built for CUDA and cannot load its operators beside a CPU build of torch; then its import
fails, because it describes two of them. timm, lightly and torchmetrics import it, and use none of its operators here.
"""

from __future__ import annotations

import importlib

import torch

try:
    importlib.import_module("torchvision")
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")  # its operators are there as long as it is
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
