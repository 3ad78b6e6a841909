"""Predict shares or stages, step time and speed-up of a cluster described in YAML."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``plan`` takes."""


def run(options: argparse.Namespace) -> None:
    """Print the prediction."""
    raise NotImplementedError
