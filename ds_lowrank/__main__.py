"""``python -m ds_lowrank``: the commands that need no launcher."""

import argparse
import sys

from ds_lowrank.commands import checkpoint, doctor, estimate, evaluate, export, glue, plot, run

COMMANDS = {
    "checkpoint": checkpoint,
    "doctor": doctor,
    "estimate": estimate,
    "evaluate": evaluate,
    "export": export,
    "glue": glue,
    "plot": plot,
    "run": run,
}


def main() -> int:
    """Run what the command line names; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ds_lowrank", description="Commands of ds_lowrank.")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed --module adds it; RANK says more
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        about = command.ABOUT
        command.add_arguments(commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}."))
    arguments = parser.parse_args()
    return int(COMMANDS[arguments.command].run(arguments))


if __name__ == "__main__":
    sys.exit(main())
