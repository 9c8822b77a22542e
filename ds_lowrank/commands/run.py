"""``python -m ds_lowrank run``: a training program of somebody else, with the methods known to it."""

from __future__ import annotations

import runpy
import sys
from argparse import REMAINDER, ArgumentParser, Namespace
from pathlib import Path

from ds_lowrank.environment.packages import is_importable
from ds_lowrank.integration.register import register

ABOUT = "run a program that trains with DeepSpeed, after ds_lowrank.register(), without changing it"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments.

    Args:
        parser: the command's.
    """
    parser.add_argument("-m", "--module", action="store_true", help="PROGRAM is a module and not a file")
    parser.add_argument("program", metavar="PROGRAM", help="the file or module to run, as python would")
    parser.add_argument("arguments", metavar="...", nargs=REMAINDER, help="its arguments")


def run(arguments: Namespace) -> int:
    """Run the program in this process, which it ends as it likes; 2 if there is no such program.

    Args:
        arguments: the command line.
    """
    program = arguments.program
    if not (is_importable(program) if arguments.module else Path(program).is_file()):
        kind, hint = ("module", "") if arguments.module else ("file", "; for a module give -m")
        print(f"python -m ds_lowrank run: there is no {kind} {program}{hint}", file=sys.stderr)
        return 2
    register()
    sys.argv = [program, *arguments.arguments]
    if arguments.module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(program).resolve().parent))  # as python does for a file
        runpy.run_path(program, run_name="__main__")
    return 0
