"""List the devices of this machine and a first guess at their shares."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``probe`` takes."""


def run(options: argparse.Namespace) -> None:
    """Print what this machine has."""
    raise NotImplementedError
