"""Measure what each layer of a model takes, for `lightning-hetero plan` with `strategy: auto`.

It trains one step on this machine, on one device, and times each layer with
the batch and with half of it.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

__all__ = ["add_arguments", "run"]

_MEASURE = "lightning_hetero.command.profile.children.measure"

_EPILOG = """\
for example, with a class Net and a function loader in my_module.py:
  lightning-hetero profile my_module:Net --data my_module:loader --json model.json

then `model: model.json` in the file of `lightning-hetero plan`:
  strategy: auto
  global_batch_size: 256
  model: model.json
  link_gigabits_per_s: 10
  devices:
    - {name: V100, count: 2, speed: 1, memory_gigabytes: 32}
    - {name: T4, count: 4, speed: 0.35, memory_gigabytes: 15}

`speed` is relative to the device on which the model was measured.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``profile``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "module",
        metavar="MODULE:NAME",
        help="A LightningModule class that needs no arguments, or a function that returns a LightningModule. MODULE is"
        " what Python would import from the current folder.",
    )
    parser.add_argument(
        "--data",
        metavar="MODULE:NAME",
        help="A LightningDataModule class, or a function that returns a loader of training batches. Default: the"
        " module's own `train_dataloader`.",
    )
    parser.add_argument(
        "--accelerator",
        default="auto",
        help="Lightning's name of the device, for example `gpu` or `cpu` (default: auto).",
    )
    parser.add_argument("--precision", default="32-true", help="Lightning's precision (default: 32-true).")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the file for `lightning-hetero plan`.")


def run(options: argparse.Namespace) -> None:
    """Measure and print.

    Args:
        options: Parsed options, with the attributes that :func:`add_arguments` declares.

    Raises:
        HeteroError: The module or its data cannot be found, or its layers cannot be measured.
    """
    from lightning_hetero.command.plan.auto.model_file import model_document
    from lightning_hetero.command.profile.output import print_model

    measured = import_module(_MEASURE).measure(options.module, options.data, options.accelerator, options.precision)
    print_model(measured)
    if options.json is not None:
        document = model_document(
            measured.model,
            module=options.module,
            device=measured.device,
            precision=options.precision,
            samples=measured.samples,
        )
        options.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
