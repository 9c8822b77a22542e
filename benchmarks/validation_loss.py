"""Validation loss of GaLore against AdamW on the same model, data, order and tokens, each at its best learning rate.

python benchmarks/validation_loss.py

Every run is launch/pretrain.py on one rank and one core, two at a time, on the standard library's source. AdamW has the
same freedom as GaLore: a rate of its own for the matrices inside the layers, which GaLore has in its ``scale``, and it
is swept where GaLore's stays at the paper's 0.25. The best setting of each is then repeated with other seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import Numbers, options, report
from validation_plot import draw

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "ds_configs/models/llama_9m.json"
VOCABULARY = 4096
SCALE = 0.25


@dataclass(frozen=True)
class Setting:
    """One run. ``scale`` is GaLore's own, or the factor on AdamW's rate for the matrices."""

    optimizer: str
    lr: float
    scale: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}_lr{self.lr:g}_scale{self.scale:g}_seed{self.seed}"


def grid(galore_lrs: list[float], adamw_lrs: list[float], scales: list[float], seed: int) -> list[Setting]:
    adamw = [Setting("AdamW", lr, scale, seed) for lr in adamw_lrs for scale in scales]
    return [*(Setting("GaLore", lr, SCALE, seed) for lr in galore_lrs), *adamw]


def write_inputs(work: Path) -> None:
    """The model and one DeepSpeed configuration for each optimizer; GaLore's rank is a quarter of the hidden size."""
    model = json.loads(MODEL.read_text()) | {"vocab_size": VOCABULARY}
    (work / "model.json").write_text(json.dumps(model))
    galore = {"lr": 0.0, "rank": model["hidden_size"] // 4, "scale": SCALE, "update_proj_gap": 50}
    for name, params in {"GaLore": galore, "AdamW": {"lr": 0.0, "torch_adam": True}}.items():
        config = {"gradient_clipping": 1.0, "optimizer": {"type": name, "params": params}}
        (work / f"{name}.json").write_text(json.dumps(config))


def train(setting: Setting, work: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The evaluated records of a run; one that ``work`` already holds finished is not repeated."""
    output = work / _sizes(arguments) / setting.name
    if not _finished(output):
        shutil.rmtree(output, ignore_errors=True)
        flags = {
            "deepspeed_config": work / f"{setting.optimizer}.json", "model": work / "model.json", "output": output,
            "data": "stdlib", "tokenizer": "bpe", "vocab-size": VOCABULARY, "cache": work / "cache",
            "sequence-length": arguments.sequence_length, "steps": arguments.steps,
            "global-batch-size": arguments.batch_size, "micro-batch-size": arguments.batch_size,
            "lr": setting.lr, "seed": setting.seed, "save-interval": 0,
            "eval-interval": max(1, arguments.steps // 10), "eval-sequences": arguments.eval_sequences,
        }  # fmt: skip
        if setting.optimizer == "AdamW":
            flags["matrix-lr-scale"] = setting.scale
        command = [sys.executable, str(ROOT / "launch/pretrain.py"), *(f"--{key}={flags[key]}" for key in flags)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{setting.name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "eval_loss" in record]
    print(f"{setting.name}: {final(records):.4f}", file=sys.stderr)
    return records


def _sizes(arguments: argparse.Namespace) -> str:
    """Names what all runs share, so that ``--work`` never mixes runs of different lengths or batches."""
    batch = f"{arguments.batch_size}x{arguments.sequence_length}"
    return f"steps{arguments.steps}_batch{batch}_eval{arguments.eval_sequences}"


def _finished(output: Path) -> bool:
    summary = output / "summary.json"
    return summary.exists() and bool(json.loads(summary.read_text())["finished"])


def final(records: list[dict[str, Any]]) -> float:
    """The last validation loss; infinite where the run diverged, which the trainer writes as null."""
    loss = records[-1]["eval_loss"]
    return float("inf") if loss is None else float(loss)


def sweep(work: Path, arguments: argparse.Namespace) -> dict[Setting, list[dict[str, Any]]]:
    """Records of the whole grid, and of the best setting of each optimizer with the other seeds."""
    write_inputs(work)
    settings = grid(arguments.galore_lrs, arguments.adamw_lrs, arguments.matrix_lr_scales, arguments.seed)
    # The first run makes the tokenizer and the tokens that the others find in the cache.
    found = {settings[0]: train(settings[0], work, arguments)}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found |= zip(settings[1:], pool.map(lambda s: train(s, work, arguments), settings[1:]), strict=True)
        seeds = [arguments.seed + 1 + extra for extra in range(arguments.extra_seeds)]
        again = [Setting(s.optimizer, s.lr, s.scale, seed) for s in best(found).values() for seed in seeds]
        found |= zip(again, pool.map(lambda s: train(s, work, arguments), again), strict=True)
    return found


def best(found: dict[Setting, list[dict[str, Any]]]) -> dict[str, Setting]:
    """The setting of each optimizer with the lowest final loss."""
    names = dict.fromkeys(s.optimizer for s in found)
    return {name: min((s for s in found if s.optimizer == name), key=lambda s: final(found[s])) for name in names}


def summary(found: dict[Setting, list[dict[str, Any]]], seed: int) -> Numbers:
    """One record for each setting of the grid; the best ones also have the mean and spread over all seeds."""
    winners = best({s: records for s, records in found.items() if s.seed == seed})
    rows: Numbers = []
    for setting in (s for s in found if s.seed == seed):
        same = [final(found[s]) for s in found if (s.optimizer, s.lr, s.scale) == _what(setting)]
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


def at_edge(rows: Numbers) -> list[str]:
    """The swept values that won at the end of their range: a better one may lie beyond."""
    found = []
    for won in (row for row in rows if row["best"]):
        for key in ("lr", "scale of the matrices"):
            tried = {row[key] for row in rows if row["optimizer"] == won["optimizer"]}
            if len(tried) > 1 and won[key] in (min(tried), max(tried)):
                found.append(f"{won['optimizer']}: the best {key}, {won[key]:g}, is at the edge of {sorted(tried)}")
    return found


def _what(setting: Setting) -> tuple[str, float, float]:
    return setting.optimizer, setting.lr, setting.scale


def parse() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps the runs, and repeats only those missing")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/validation_loss.png")
    parser.add_argument("--galore-lrs", type=float, nargs="+", default=[5e-3, 1e-2, 2e-2])
    parser.add_argument("--adamw-lrs", type=float, nargs="+", default=[2.5e-3, 5e-3, 1e-2])
    parser.add_argument("--matrix-lr-scales", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--extra-seeds", type=int, default=2, help="for the best of each")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens")
    parser.add_argument("--eval-sequences", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    arguments = parser.parse_args()
    if arguments.quick:
        smoke = {"steps": 10, "galore_lrs": [1e-2], "adamw_lrs": [5e-3], "matrix_lr_scales": [0.5, 1.0]}
        vars(arguments).update(smoke, extra_seeds=1, eval_sequences=16)
    return arguments


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = sweep(work, arguments)
    rows = summary(found, arguments.seed)
    report(rows, arguments)
    print(*at_edge(rows), sep="\n")
    grid_runs = {s: records for s, records in found.items() if s.seed == arguments.seed}
    draw(grid_runs, best(grid_runs), arguments.plot)


if __name__ == "__main__":
    main()
