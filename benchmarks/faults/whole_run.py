"""A run without a fault: made once, copied as a kill would have left it, resumed, and compared with."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.programs import MODEL, run
from benchmarks.faults.trial import Outcome

RANKS = 2
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "GaLore": {"lr": 1e-2, "rank": 8, "update_proj_gap": 2},
    "AdamW": {"lr": 1e-2, "torch_adam": True},
}
"""Types and options: a method, whose checkpoints know no grid, and an optimizer whose files are DeepSpeed's."""


@dataclass(frozen=True)
class Run:
    """A run without a fault, which the trials copy and compare with.

    Attributes:
        program: ``pretrain`` or ``finetune``.
        arguments: its command line, except for ``--output``.
        output: its output folder.
    """

    program: str
    arguments: tuple[str, ...]
    output: Path

    def copy(self, folder: Path, steps: tuple[int, ...] = (3,)) -> Path:
        """Copy what a kill after the last of ``steps`` leaves, and return the output folder of the copy."""
        output = folder / "output"
        (output / "checkpoints").mkdir(parents=True)
        for step in steps:
            shutil.copytree(self.output / "checkpoints" / f"global_step{step}", checkpoint(output, step))
        lines = (self.output / "metrics.jsonl").read_text().splitlines(keepends=True)
        (output / "metrics.jsonl").write_text("".join(lines[: max(steps)]))
        shutil.copy(self.output / ".checkpoints", output)
        if (self.output / "best").exists():
            shutil.copytree(self.output / "best", output / "best")
        return output

    def resume(self, output: Path, choice: str = "") -> Outcome:
        """Resume a copy; the run's own result is the only one that is right."""
        resume = ["--resume", *([choice] if choice else [])]
        finished = run(self.program, [*self.arguments, "--output", str(output), *resume], RANKS, output.parent)
        if (output.parent / "ran").exists():
            return Outcome("ran code")
        if not finished.succeeded:
            return finished.refusal()
        different = [
            name for name in ("metrics.jsonl", "export") if _result(output, name) != _result(self.output, name)
        ]
        return Outcome("other result", ", ".join(different)) if different else Outcome("same result")


def checkpoint(output: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return output / "checkpoints" / f"global_step{step}"


def _result(output: Path, name: str) -> Any:
    if name == "export":
        return (output / name / "model.safetensors").read_bytes()
    records = [json.loads(line) for line in (output / name).read_text().splitlines()]
    timed = ("seconds", "projected_end", "tokens_per_second", "per_gpu", "gib")
    return [{key: value for key, value in record.items() if not key.endswith(timed)} for record in records]


@functools.cache
def workspace() -> Path:
    """A folder with a model's configuration and data for both programs, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="faults-")) / "work"  # the outputs of the programs are written beside it
    folder.mkdir()
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    (folder / "model.json").write_text(json.dumps({**MODEL, "num_hidden_layers": 1}))
    (folder / "text").mkdir()
    for number in range(60):
        (folder / "text" / f"{number}.txt").write_text(" ".join(str(number * step % 97) for step in range(100)))
    rows = [{"text": f"{number} is {number % 3}", "label": "abc"[number % 3]} for number in range(60)]
    for name, part in (("train", rows[:45]), ("validation", rows[45:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@functools.cache
def finished_run(program: str, stage: int, optimizer: str) -> Run:
    """The run without a fault, made once per process.

    Args:
        program: ``pretrain`` or ``finetune``.
        stage: its ZeRO stage.
        optimizer: a key of ``OPTIMIZERS``.
    """
    folder = workspace()
    output = folder / f"{program}{stage}{optimizer}"
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": optimizer, "params": OPTIMIZERS[optimizer]},
        "zero_optimization": {"stage": stage},
    }
    settings = folder / f"{stage}{optimizer}.json"
    settings.write_text(json.dumps(config))
    model = "model.json" if program == "pretrain" else "pretrain2GaLore/export"
    data = ["--data", str(folder / "text"), "--sequence-length", "32", "--eval-sequences", "0", "--tokenizer", "bytes"]
    if program == "finetune":
        finished_run("pretrain", 2, "GaLore")
        data = ["--data", str(folder / "train.jsonl"), "--validation", str(folder / "validation.jsonl")]
        data += ["--max-length", "16", "--eval-interval", "2"]
    arguments = ["--deepspeed_config", str(settings), "--model", str(folder / model), *data]
    arguments += ["--cache", str(folder / "cache"), "--steps", "6", "--log-interval", "1", "--save-interval", "3"]
    arguments.append("--export")
    finished = run(program, [*arguments, "--output", str(output)], RANKS, folder)
    if not finished.succeeded:
        raise RuntimeError(f"the run without a fault failed: {finished.err}")
    return Run(program, tuple(arguments), output)
