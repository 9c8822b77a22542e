"""Loss curves with moments in sixteen and in eight bits against those in fp32, and the bytes of state.

python -m benchmarks.state_dtype

Every run is launch/pretrain.py on one rank and one core, two at a time, on the standard library's source, at a
rate of 0.02 and a scale of 0.125. Held-out loss is found after every tenth of the steps. *off* is the
largest relative difference from the fp32 run of the same method and seed at any of them, *bytes* the state of the
projected matrices over that of fp32.
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
STATE_DTYPES = ("fp32", "bf16", "int8")
LR, SCALE = 2e-2, 0.125
"""Near the best of GaLore and of AdaRankGrad in methods.py."""


def largest_difference(curve: Records, exact: Records) -> float:
    """Relative, over all evaluations."""
    ratios = [float(a["eval_loss"]) / float(b["eval_loss"]) for a, b in zip(curve, exact, strict=True)]
    return max(abs(ratio - 1) for ratio in ratios)


def run(method: str, state_dtype: str, seed: int, work: Path, arguments: argparse.Namespace) -> Records:
    setting = Setting(f"{method}-{state_dtype}", LR, SCALE, seed)
    params = {**METHODS[method], "lr": LR, "scale": SCALE, "state_dtype": state_dtype}
    return runs.train(setting, {"type": method, "params": params}, work, arguments, None)


def table(found: dict[tuple[str, str, int], Records]) -> Numbers:
    rows: Numbers = []
    for (method, state_dtype, seed), records in found.items():
        exact = found[method, "fp32", seed]
        rows.append(
            {
                "optimizer": method,
                "state_dtype": state_dtype,
                "seed": seed,
                "final loss": final(records),
                "off": largest_difference(records, exact),
                "bytes": records[-1]["lowrank/state_bytes"] / exact[-1]["lowrank/state_bytes"],
            }
        )
    return rows


def main() -> None:
    parser = options(__doc__)
    runs.add_run_options(parser, steps=300)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=10, seeds=1, eval_sequences=8)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    cases = list(product(METHODS, STATE_DTYPES, seeds))
    with runs.working_folder(arguments.work) as work, ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda case: run(case[0], case[1], case[2], work, arguments), cases))
    report(table(dict(zip(cases, found, strict=True))), arguments)


if __name__ == "__main__":
    main()
