"""Validation loss of GaLore against AdamW on the same model, data, order and tokens, each at its best learning rate.

python -m benchmarks.validation_loss

Every run is launch/pretrain.py on one rank and one core, two runs at a time, on the standard library's source. AdamW
has the same freedom as GaLore, whose ``scale`` multiplies the learning rate of the matrices in the layers: a separate
learning rate for them, which is swept, while GaLore keeps the paper's 0.25. The best setting of each is then repeated
with other seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import runs
from benchmarks.common import Numbers, options, report
from benchmarks.plots import draw_sweep
from benchmarks.runs import Found, Records, Setting, at_edge, best, final, over_seeds

SCALE = 0.25


def grid(galore_lrs: list[float], adamw_lrs: list[float], scales: list[float], seed: int) -> list[Setting]:
    """Return all settings of the sweep."""
    adamw = [Setting("AdamW", lr, scale, seed) for lr in adamw_lrs for scale in scales]
    return [*(Setting("GaLore", lr, SCALE, seed) for lr in galore_lrs), *adamw]


def train(setting: Setting, work: Path, arguments: argparse.Namespace) -> Records:
    """Return the records of a run; GaLore's rank is a quarter of the hidden size."""
    own: dict[str, Any] = {"torch_adam": True}
    if setting.optimizer == "GaLore":
        own = {"rank": runs.model()["hidden_size"] // 4, "scale": SCALE, "update_proj_gap": 50}
    optimizer = {"type": setting.optimizer, "params": {"lr": setting.lr, **own}}
    factor = setting.scale if setting.optimizer == "AdamW" else None
    return runs.train(setting, optimizer, work, arguments, factor)


def sweep(settings: list[Setting], run: Callable[[Setting], Records], jobs: int, extra_seeds: int) -> Found:
    """Return the records of the whole grid, and of each optimizer's best setting with further seeds."""
    # The first run caches the tokenizer and the tokens for all others.
    found = {settings[0]: run(settings[0])}
    with ThreadPoolExecutor(jobs) as pool:
        found |= zip(settings[1:], pool.map(run, settings[1:]), strict=True)
        again = [
            replace(setting, seed=setting.seed + 1 + extra)
            for setting in best(found).values()
            for extra in range(extra_seeds)
        ]
        found |= zip(again, pool.map(run, again), strict=True)
    return found


def summary(found: Found, seed: int) -> Numbers:
    """Return one record per setting of the grid; the best ones also have the mean and deviation over all seeds."""
    winners = best({s: records for s, records in found.items() if s.seed == seed})
    rows: Numbers = []
    for setting in (s for s in found if s.seed == seed):
        same = over_seeds(found, setting)
        won = setting in winners.values()
        rows.append(
            {
                "optimizer": setting.optimizer,
                "lr": setting.lr,
                "scale of the matrices": setting.scale,
                "validation loss": final(found[setting]),
                "best": "yes" if won else "",
                "mean over seeds": mean(same) if won else None,
                "deviation": stdev(same) if won and len(same) > 1 else None,
            }
        )
    return rows


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    runs.add_run_options(parser, steps=400)
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="default: docs/images/validation_loss.png; none if --quick"
    )
    parser.add_argument("--galore-lrs", type=float, nargs="+", default=[5e-3, 1e-2, 2e-2])
    parser.add_argument("--adamw-lrs", type=float, nargs="+", default=[2.5e-3, 5e-3, 1e-2])
    parser.add_argument("--matrix-lr-scales", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--extra-seeds", type=int, default=2, help="for the best setting of each optimizer")
    arguments = parser.parse_args()
    if arguments.quick:
        smoke = {"steps": 10, "galore_lrs": [1e-2], "adamw_lrs": [5e-3], "matrix_lr_scales": [0.5, 1.0]}
        vars(arguments).update(smoke, extra_seeds=1, eval_sequences=16)
    elif arguments.plot is None:
        arguments.plot = runs.ROOT / "docs/images/validation_loss.png"
    return arguments


def main() -> None:
    """Measure and report."""
    arguments = parse()
    settings = grid(arguments.galore_lrs, arguments.adamw_lrs, arguments.matrix_lr_scales, arguments.seed)
    with runs.working_folder(arguments.work) as work:
        found = sweep(settings, lambda s: train(s, work, arguments), arguments.jobs, arguments.extra_seeds)
    rows = summary(found, arguments.seed)
    report(rows, arguments)
    print(*at_edge(rows), sep="\n")
    grid_runs = {s: records for s, records in found.items() if s.seed == arguments.seed}
    if arguments.plot is not None:
        draw_sweep(grid_runs, best(grid_runs), arguments.plot)


if __name__ == "__main__":
    main()
