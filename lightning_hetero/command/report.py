"""Turn the record of a run into one self-contained HTML page."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``report`` takes."""


def run(options: argparse.Namespace) -> None:
    """Write the page."""
    raise NotImplementedError
