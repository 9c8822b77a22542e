"""What each option of Tandem is worth: validation loss with one of them changed at a time, at the same learning rates.

python -m benchmarks.ablation

The model, data, tokens and settings of ``benchmarks/methods.py``, small size. The rates are those that are best for the
default options there; an option that is changed might do better at other ones. Every run has the same seeds, so that
differences within a seed count, and *difference* is their mean. Runs that a file of ``--json`` has are not repeated.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from statistics import mean
from typing import Any

from benchmarks import runs
from benchmarks.common import Numbers, options, origin, write_json
from benchmarks.common import table as as_markdown
from benchmarks.runs import Setting, final
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


def record_of(kept: KeptRuns[Setting], change: dict[str, Any], settings: list[Setting], defaults: list[float]) -> Any:
    """Return one row of the table."""
    losses = [final(kept.found[setting]) for setting in settings]
    return {
        "changed": ", ".join(f"{key} {value}" for key, value in change.items()) or "nothing",
        "loss": mean(losses),
        "seeds": ", ".join(f"{loss:.3f}" for loss in losses),
        "difference": mean(losses) - mean(defaults),
        "state bytes": kept.found[settings[0]][-1]["lowrank/state_bytes"],
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
    lr, scale, rank = arguments.lr, arguments.scale, runs.model()["hidden_size"] // 4
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    shared = {key: getattr(arguments, key) for key in ("steps", "batch_size", "sequence_length")}
    kept = KeptRuns(arguments.json, shared, Setting, KEPT)
    settings = {label(change): [Setting(label(change), lr, scale, seed) for seed in seeds] for change in CHANGES}
    with runs.working_folder(arguments.work) as work, ThreadPoolExecutor(arguments.jobs) as pool:

        def run(change: dict[str, Any], seed: int) -> None:
            optimizer = {"type": "Tandem", "params": {"rank": rank, "lr": lr, "scale": scale, **change}}
            setting = Setting(label(change), lr, scale, seed)
            kept.get(setting, partial(runs.train, setting, optimizer, work, arguments, None))

        list(pool.map(run, *zip(*product(CHANGES, seeds), strict=True)))
    defaults = [final(kept.found[setting]) for setting in settings[label({})]]
    rows: Numbers = [record_of(kept, change, settings[label(change)], defaults) for change in CHANGES]
    print(as_markdown(rows))
    if arguments.json is not None:
        write_json(arguments.json, {**origin(arguments), "numbers": rows, **kept.as_record()})


if __name__ == "__main__":
    main()
