"""``python -m ds_lowrank``: the commands that need no launcher."""

import argparse
import sys

from ds_lowrank.environment.doctor import doctor


def main() -> int:
    """Run what the command line names; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ds_lowrank", description="Commands of ds_lowrank.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "say what is installed, which of it is used, and what is missing"
    commands.add_parser("doctor", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.parse_args()
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
