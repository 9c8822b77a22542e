"""Everything that one card can say about this package, in at most eight minutes.

python -m benchmarks.gpu --output runs/gpu

Runs the tests marked ``gpu``; compares several steps of every method with the same on the CPU; times the optimizer step
and the whole training step of every method in turns with torch's fused AdamW and galore-torch, and measures their
memory. Prints tables and writes ``gpu.json``. Cells are measured in order of importance; those for which there is no
time are listed. ``--device cpu`` does the same with small shapes, so that only the device is untried.

The exit code is 1 if a test failed or did not end in time, or a method disagrees with the CPU.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import provenance, write_json
from benchmarks.gpu.agreement import agreement
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import STEP_CELLS, TINY_CELLS, WHOLE_CELLS
from benchmarks.gpu.gpu_tests import run_tests
from benchmarks.gpu.report import machine, packages, peers, show, verdict
from benchmarks.gpu.timing import Section, prepare_step, prepare_whole, time_cells

SHARES = {"tests": 0.36, "agreement": 0.12, "steps": 0.37, "whole_steps": 0.15}
"""Of the time limit, in the order in which the sections run."""


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="DIR", help="for gpu.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, default=450.0, metavar="SECONDS", help="for all sections together")
    parser.add_argument("--quick", action="store_true", help="a smoke run with small shapes: its times mean nothing")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available: pass --device cpu to try everything but the device")
    return arguments


def main() -> int:
    """Run all sections, report, and return the exit code."""
    arguments = parse()
    logging.disable(logging.WARNING)
    started = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else torch.device("cpu")
    budget = Budget(arguments.time_limit, SHARES)
    small = arguments.quick or device.type == "cpu"

    def section(name: str) -> Section:
        _say(name, budget)
        return Section(name, budget, device, arguments.seed, small)

    _say("tests", budget)
    tests = run_tests(device.type, budget.left("tests"))
    _say("agreement", budget)
    compared = agreement(device, arguments.seed, budget)
    steps = section("steps")
    time_cells(steps, TINY_CELLS if small else STEP_CELLS, prepare_step)
    whole = section("whole_steps")
    time_cells(whole, TINY_CELLS if small else WHOLE_CELLS, prepare_whole)
    record = {
        **provenance("benchmarks.gpu", arguments),
        "hardware": machine(device),
        "packages": packages(),
        "peers": peers(),
        "seconds": time.monotonic() - started,
        "tests": tests,
        "agreement": compared,
        "steps": steps.rows,
        "whole_steps": whole.rows,
        "skipped": steps.skipped + whole.skipped,
    }
    record["verdict"], code = verdict(record)
    record["exit code"] = code
    write_json(arguments.output / "gpu.json", record)
    show(record)
    return code


def _say(section: str, budget: Budget) -> None:
    print(f"{section}: at most {max(budget.left(section), 0):.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
