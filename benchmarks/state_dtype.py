"""Loss curves and bytes of state with moments and bases in sixteen, eight and four bits, compared with fp32.

python -m benchmarks.state_dtype

Every run is launch/pretrain.py on one rank and one core, two runs at a time, on the standard library's source, with
a learning rate of 0.02 and a scale of 0.125. The held-out loss is evaluated ten times per run. *off* is its largest
relative difference from the fp32 run of the same method and seed, *bytes* the size of the projected matrices' state
relative to fp32.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import runs
from benchmarks.common import Numbers, options, report
from benchmarks.runs import Records, Setting, final

RANK = runs.model()["hidden_size"] // 4
METHODS: dict[str, dict[str, Any]] = {
    "GaLore": {"rank": RANK, "update_proj_gap": 50},
    "GradNormLoRP": {"rank": RANK, "update_proj_gap": 50},
}
FORMATS = (("fp32", "fp32"), ("bf16", "fp32"), ("int8", "fp32"), ("fp32", "bf16"), ("fp32", "int4"), ("int8", "int4"))
"""``state_dtype`` and ``basis_dtype``."""
LR, SCALE = 2e-2, 0.125
"""Close to the best values of GaLore and AdaRankGrad in methods.py."""


def largest_difference(curve: Records, exact: Records) -> float:
    """Return the largest relative difference of two loss curves."""
    ratios = [float(a["eval_loss"]) / float(b["eval_loss"]) for a, b in zip(curve, exact, strict=True)]
    return max(abs(ratio - 1) for ratio in ratios)


def run(method: str, formats: tuple[str, str], seed: int, work: Path, arguments: argparse.Namespace) -> Records:
    """Train with one method, formats of the moments and of the bases, and one seed."""
    setting = Setting(f"{method}-{'-'.join(formats)}", LR, SCALE, seed)
    own = {"state_dtype": formats[0], "basis_dtype": formats[1]}
    params = {**METHODS[method], "lr": LR, "scale": SCALE, **own}
    return runs.train(setting, {"type": method, "params": params}, work, arguments, None)


def table(found: dict[tuple[str, tuple[str, str], int], Records]) -> Numbers:
    """Return one record per run."""
    rows: Numbers = []
    for (method, formats, seed), records in found.items():
        exact = found[method, FORMATS[0], seed]
        rows.append(
            {
                "optimizer": method,
                "state_dtype": formats[0],
                "basis_dtype": formats[1],
                "seed": seed,
                "final loss": final(records),
                "off": largest_difference(records, exact),
                "bytes": records[-1]["lowrank/state_bytes"] / exact[-1]["lowrank/state_bytes"],
            }
        )
    return rows


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    runs.add_run_options(parser, steps=300)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=10, seeds=1, eval_sequences=8)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    cases = list(product(METHODS, FORMATS, seeds))
    with runs.working_folder(arguments.work) as work, ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda case: run(case[0], case[1], case[2], work, arguments), cases))
    report(table(dict(zip(cases, found, strict=True))), arguments)


if __name__ == "__main__":
    main()
