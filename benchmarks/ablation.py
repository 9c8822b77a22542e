"""What each option of Tandem is worth: validation loss with one of them changed at a time, at the same learning rates.

python -m benchmarks.ablation

The model, data, tokens and settings of ``benchmarks/methods.py``, small size. The rates are those that are best for the
default options there; an option that is changed might do better at other ones. Every run has the same seeds, so that
differences within a seed count, and *difference* is their mean. Runs that a file of ``--json`` has are not repeated.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from statistics import mean
from typing import Any

from benchmarks import runs
from benchmarks.common import Numbers, options, origin, write_json
from benchmarks.common import table as as_markdown
from benchmarks.contenders import Contender
from benchmarks.methods import Table
from benchmarks.runs import Setting
from benchmarks.sweeps import KeptRuns

KEPT = ("step", "eval_loss", "lowrank/state_bytes")
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"rest_weight": 0.0},
    {"rest_weight": 1.0},
    {"rest_weight": 4.0},
    {"momentum": 0.0},
    {"momentum": 0.8},
    {"momentum": 0.95},
    {"rank": 4},
    {"rank": 16},
    {"rank": 64},
    {"update_proj_gap": 5},
    {"update_proj_gap": 100},
    {"power_steps": 0},
    {"max_relative_step": None},
    {"max_relative_step": 0.03},
    {"max_relative_step": 0.1},
    {"state_dtype": "int8", "basis_dtype": "int4"},
)
"""Options that differ from the defaults, at a rank of a quarter of the width."""


def label(change: dict[str, Any]) -> str:
    """Name what is changed, as a part of a file's name."""
    return "_".join(["Tandem", *(f"{key}={value}" for key, value in change.items())])


def record_of(table: Table, change: dict[str, Any], setting: Setting, default: Setting) -> dict[str, Any]:
    """Return one row of the table."""
    losses, defaults = table.losses(setting).values(), table.losses(default).values()
    return {
        "changed": ", ".join(f"{key} {value}" for key, value in change.items()) or "nothing",
        "loss": mean(losses),
        "seeds": ", ".join(f"{loss:.3f}" for loss in losses),
        "difference": mean(losses) - mean(defaults),
        "state bytes": table.found[setting][-1]["lowrank/state_bytes"],
    }


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    runs.add_run_options(parser, steps=300)
    parser.add_argument("--lr", type=float, default=0.08, help="of everything")
    parser.add_argument("--scale", type=float, default=0.25, help="the factor on the matrices' rate")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=10, eval_sequences=16)
    return arguments


def main() -> None:
    """Measure and report."""
    arguments = parse()
    rank = runs.model()["hidden_size"] // 4
    shared = {key: getattr(arguments, key) for key in ("steps", "batch_size", "sequence_length")}
    kept = KeptRuns(arguments.json, shared, Setting, KEPT)
    contenders = [Contender(label(change), "Tandem", {"rank": rank, **change}, arguments.scale) for change in CHANGES]
    settings = [Setting(contender.name, arguments.lr, contender.scale, arguments.seed) for contender in contenders]
    with runs.working_folder(arguments.work) as work, ThreadPoolExecutor(arguments.jobs) as pool:
        table = Table(work, arguments, kept)
        list(pool.map(table.with_all_seeds, contenders, settings))
    rows: Numbers = [record_of(table, change, own, settings[0]) for change, own in zip(CHANGES, settings, strict=True)]
    print(as_markdown(rows))
    if arguments.json is not None:
        write_json(arguments.json, {**origin(arguments), "numbers": rows, **kept.as_record()})


if __name__ == "__main__":
    main()
