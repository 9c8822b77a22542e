"""Complete runs of the launch scripts for benchmarks that compare them: same model, data, order and tokens.

Every run is one rank on one core, on the standard library's source. The model is small: ``llama_9m`` with a smaller
vocabulary.
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
"""The lines of a run's metrics.jsonl that have a validation loss."""


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        optimizer: The label of the optimizer.
        lr: The learning rate.
        scale: The method's ``scale`` option, or for a dense optimizer the factor on the learning rate of the matrices.
        seed: Seed of the weights and the order of the data.
    """

    optimizer: str
    lr: float
    scale: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's files."""
        return f"{self.optimizer}_lr{self.lr:g}_scale{self.scale:g}_seed{self.seed}"


Found = dict[Setting, Records]


def add_run_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """Add the options that all runs of a benchmark share."""
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the runs here; only missing ones are run")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens")
    parser.add_argument("--eval-sequences", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, one core each")


def model() -> dict[str, Any]:
    """Return the model's configuration under Hugging Face's keys."""
    entries: dict[str, Any] = json.loads(MODEL.read_text()) | {"vocab_size": VOCABULARY}
    return entries


@contextmanager
def working_folder(chosen: Path | None) -> Iterator[Path]:
    """Provide a folder with the model's configuration in it.

    Args:
        chosen: The folder of ``--work``; None for a temporary one that is removed at the end.
    """
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
    """Return the records of a run; one that is finished in ``work``, with the same optimizer, is not repeated.

    Args:
        setting: The run.
        optimizer: DeepSpeed's ``optimizer`` entry.
        work: The folder for all runs.
        arguments: From :func:`add_run_options`.
        matrix_lr_scale: The factor on a dense optimizer's learning rate for the matrices; None for a low-rank method.

    Raises:
        RuntimeError: The run failed.
    """
    output = work / _sizes(arguments) / setting.name
    flags = {
        "model": work / "model.json",
        "data": "stdlib", "tokenizer": "bpe", "vocab-size": VOCABULARY, "cache": work / "cache",
        "sequence-length": arguments.sequence_length, "steps": arguments.steps,
        "global-batch-size": arguments.batch_size, "micro-batch-size": arguments.batch_size,
        "seed": setting.seed, "save-interval": 0,
        "eval-interval": max(1, arguments.steps // 10), "eval-sequences": arguments.eval_sequences,
    }  # fmt: skip
    if matrix_lr_scale is not None:
        flags["matrix-lr-scale"] = matrix_lr_scale
    launch_once("pretrain.py", optimizer, output, flags)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "eval_loss" in record]
    print(f"{setting.name}: {final(records):.4f}", file=sys.stderr, flush=True)
    return records


def launch_once(
    script: str, optimizer: Mapping[str, Any], output: Path, flags: Mapping[str, Any], *switches: str
) -> None:
    """Run a script of launch/ into a folder, unless it has a finished run with the same optimizer.

    Args:
        script: The name of the file.
        optimizer: DeepSpeed's ``optimizer`` entry; the configuration is written beside the folder.
        output: The folder.
        flags: Options and their values, without the leading dashes, the configuration and the folder.
        switches: Options without a value.

    Raises:
        RuntimeError: The script failed.
    """
    config = json.dumps({"gradient_clipping": 1.0, "optimizer": optimizer})
    file = output.parent / f"{output.name}.json"
    if finished(output, file, config):
        return
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config)
    launch(script, {"deepspeed_config": file, "output": output, **flags}, *switches)


def launch(script: str, flags: Mapping[str, Any], *switches: str) -> None:
    """Run a script of launch/ on one rank and one core.

    Args:
        script: The name of the file.
        flags: Options and their values, without the leading dashes.
        switches: Options without a value.

    Raises:
        RuntimeError: The script failed; the message has the end of its output.
    """
    command = [sys.executable, str(ROOT / "launch" / script), *(f"--{key}={flags[key]}" for key in flags), *switches]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{flags['output']} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _sizes(arguments: argparse.Namespace) -> str:
    """Name what all runs share, so that ``--work`` never mixes runs of different lengths or batch sizes."""
    batch = f"{arguments.batch_size}x{arguments.sequence_length}"
    return f"steps{arguments.steps}_batch{batch}_eval{arguments.eval_sequences}"


def finished(output: Path, file: Path, config: str) -> bool:
    """Whether ``output`` has a finished run and ``file`` contains this configuration."""
    summary = output / "summary.json"
    if not summary.exists() or not file.exists() or file.read_text() != config:
        return False
    return bool(json.loads(summary.read_text())["finished"])


def final(records: Records) -> float:
    """Return the last validation loss; infinity if the run diverged, which the trainer records as null."""
    loss = records[-1]["eval_loss"]
    return math.inf if loss is None else float(loss)


def over_seeds(found: Found, setting: Setting) -> list[float]:
    """Return the final loss of a setting for every seed that was run."""
    what = (setting.optimizer, setting.lr, setting.scale)
    return [final(found[s]) for s in found if (s.optimizer, s.lr, s.scale) == what]


def best(found: Found) -> dict[str, Setting]:
    """Return each optimizer's setting with the lowest final loss, as a mean over seeds."""
    names = dict.fromkeys(s.optimizer for s in found)
    return {
        name: min((s for s in found if s.optimizer == name), key=lambda s: mean(over_seeds(found, s))) for name in names
    }


def at_edge(rows: Numbers) -> list[str]:
    """Return a sentence for each swept value that is best at the edge of its range, beyond which may be better ones."""
    found = []
    for won in (row for row in rows if row["best"]):
        for key in ("lr", "scale of the matrices"):
            tried = {row[key] for row in rows if row["optimizer"] == won["optimizer"]}
            if len(tried) > 1 and won[key] in (min(tried), max(tried)):
                found.append(f"{won['optimizer']}: the best {key}, {won[key]:g}, is at the edge of {sorted(tried)}")
    return found
