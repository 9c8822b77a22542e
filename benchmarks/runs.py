"""Whole runs of the launch scripts that a benchmark compares: the same model, data, order and tokens.

Every run is one rank on one core, on the standard library's source. The model is small: ``llama_9m`` with a vocabulary
of its own size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import Numbers

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "ds_configs/models/llama_9m.json"
VOCABULARY = 4096

Records = list[dict[str, Any]]
"""The lines of a run's metrics.jsonl that were evaluated."""


@dataclass(frozen=True)
class Setting:
    """One run. ``scale`` is the method's own, or the factor on a dense optimizer's rate for the matrices."""

    optimizer: str
    lr: float
    scale: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}_lr{self.lr:g}_scale{self.scale:g}_seed{self.seed}"


Found = dict[Setting, Records]


def add_run_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """What all runs of a benchmark share."""
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps the runs, and repeats only those missing")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens")
    parser.add_argument("--eval-sequences", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")


def model() -> dict[str, Any]:
    """The model's configuration."""
    entries: dict[str, Any] = json.loads(MODEL.read_text()) | {"vocab_size": VOCABULARY}
    return entries


@contextmanager
def working_folder(chosen: Path | None) -> Iterator[Path]:
    """The folder of ``--work``, or one that is removed at the end, with the model's configuration in it."""
    with tempfile.TemporaryDirectory() as temporary:
        work = chosen or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        (work / "model.json").write_text(json.dumps(model()))
        yield work


def train(
    setting: Setting,
    optimizer: Mapping[str, Any],
    work: Path,
    arguments: argparse.Namespace,
    matrix_lr_scale: float | None,
) -> Records:
    """The records of a run; one that ``work`` already holds finished, with the same optimizer, is not repeated.

    Args:
        optimizer: DeepSpeed's entry.
        matrix_lr_scale: of a dense optimizer.
    """
    output = work / _sizes(arguments) / setting.name
    config = json.dumps({"gradient_clipping": 1.0, "optimizer": optimizer})
    file = output.parent / f"{setting.name}.json"
    if not finished(output, file, config):
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(config)
        flags = {
            "deepspeed_config": file, "model": work / "model.json", "output": output,
            "data": "stdlib", "tokenizer": "bpe", "vocab-size": VOCABULARY, "cache": work / "cache",
            "sequence-length": arguments.sequence_length, "steps": arguments.steps,
            "global-batch-size": arguments.batch_size, "micro-batch-size": arguments.batch_size,
            "seed": setting.seed, "save-interval": 0,
            "eval-interval": max(1, arguments.steps // 10), "eval-sequences": arguments.eval_sequences,
        }  # fmt: skip
        if matrix_lr_scale is not None:
            flags["matrix-lr-scale"] = matrix_lr_scale
        launch("pretrain.py", flags)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "eval_loss" in record]
    print(f"{setting.name}: {final(records):.4f}", file=sys.stderr, flush=True)
    return records


def launch(script: str, flags: Mapping[str, Any], *switches: str) -> None:
    """Run a script of launch/ on one rank and one core; raises RuntimeError with the end of its output."""
    command = [sys.executable, str(ROOT / "launch" / script), *(f"--{key}={flags[key]}" for key in flags), *switches]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{flags['output']} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _sizes(arguments: argparse.Namespace) -> str:
    """Names what all runs share, so that ``--work`` never mixes runs of different lengths or batches."""
    batch = f"{arguments.batch_size}x{arguments.sequence_length}"
    return f"steps{arguments.steps}_batch{batch}_eval{arguments.eval_sequences}"


def finished(output: Path, file: Path, config: str) -> bool:
    """Whether `output` holds a whole run with the configuration that `file` has."""
    summary = output / "summary.json"
    if not summary.exists() or not file.exists() or file.read_text() != config:
        return False
    return bool(json.loads(summary.read_text())["finished"])


def final(records: Records) -> float:
    """The last validation loss; infinite where the run diverged, which the trainer writes as null."""
    loss = records[-1]["eval_loss"]
    return math.inf if loss is None else float(loss)


def over_seeds(found: Found, setting: Setting) -> list[float]:
    """The final losses of a setting with every seed that was run."""
    what = (setting.optimizer, setting.lr, setting.scale)
    return [final(found[s]) for s in found if (s.optimizer, s.lr, s.scale) == what]


def best(found: Found) -> dict[str, Setting]:
    """The setting of each optimizer with the lowest final loss, the mean over its seeds."""
    names = dict.fromkeys(s.optimizer for s in found)
    return {
        name: min((s for s in found if s.optimizer == name), key=lambda s: mean(over_seeds(found, s))) for name in names
    }


def at_edge(rows: Numbers) -> list[str]:
    """The swept values that won at the end of their range: a better one may lie beyond."""
    found = []
    for won in (row for row in rows if row["best"]):
        for key in ("lr", "scale of the matrices"):
            tried = {row[key] for row in rows if row["optimizer"] == won["optimizer"]}
            if len(tried) > 1 and won[key] in (min(tried), max(tried)):
                found.append(f"{won['optimizer']}: the best {key}, {won[key]:g}, is at the edge of {sorted(tried)}")
    return found
