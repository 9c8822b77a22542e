"""``python -m ds_lowrank doctor``: what is installed, used and missing."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

ABOUT = "say what is installed, which of it is used, and what is missing"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments: it has none."""


def run(arguments: Namespace) -> int:
    """Print the report; 1 if something required is missing or something is wrong, else 0."""
    from ds_lowrank.environment.doctor import doctor

    return doctor()
