"""``python -m ds_lowrank doctor``: what is installed, used and missing."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

ABOUT = "say what is installed, which of it is used, and what is missing"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--bench", action="store_true", help="measure matrix products, memory and network instead")


def run(arguments: Namespace) -> int:
    """Print the report; 1 if something required is missing or something is wrong, else 0."""
    if arguments.bench:
        from ds_lowrank.environment.bench import bench

        return bench()
    from ds_lowrank.environment.doctor import doctor

    return doctor()
