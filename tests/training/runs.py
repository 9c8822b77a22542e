"""Runs of launch/pretrain.py on a model that steps in milliseconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training import forked_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "pretrain.py"

MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "AdaRankGrad": {
        "type": "AdaRankGrad",
        "params": {"lr": 1e-2, "rank_max": 16, "residual_tol": 0.3, "update_proj_gap": 2},
    },
    "GaLore": {"type": "GaLore", "params": {"lr": 1e-2, "rank": 8, "update_proj_gap": 2}},
}
SEQUENCE_LENGTH = 32
TIMEOUT = 300
"""Seconds until a script counts as hanging. It takes ten on an idle machine, and this one may be busy."""


def deepspeed_config(optimizer: str = "GaLore", zero_stage: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": json.loads(json.dumps(OPTIMIZERS[optimizer])),
        "zero_optimization": {"stage": zero_stage},
        **more,
    }


@dataclass(frozen=True)
class Workspace:
    """A folder with a model, a text, and the output of runs."""

    path: Path

    @classmethod
    def make(cls, path: Path) -> Workspace:
        (path / "model.json").write_text(json.dumps(MODEL))
        (path / "text").mkdir()
        for number in range(100):  # enough that one in twenty is held out
            words = " ".join(f"{(number * step) % 97}" for step in range(150))
            (path / "text" / f"{number}.txt").write_text(words)
        return cls(path)

    def arguments(self, output: str, *, config: dict[str, Any] | None = None, steps: int = 6) -> list[str]:
        config_path = self.path / f"{output}.json"
        config_path.write_text(json.dumps(config or deepspeed_config()))
        return [
            *("--deepspeed_config", str(config_path), "--model", str(self.path / "model.json")),
            *("--data", str(self.path / "text"), "--tokenizer", "bytes", "--cache", str(self.path / "cache")),
            *("--sequence-length", str(SEQUENCE_LENGTH), "--steps", str(steps), "--log-interval", "1"),
            *("--eval-sequences", "5", "--output", str(self.path / output)),
        ]

    def start(self, arguments: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        environment = {
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
        }
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(
            [sys.executable, *launcher, str(SCRIPT), *arguments],
            env=environment,
            cwd=self.path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, arguments: list[str], launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        process = self.start(arguments, launcher)
        out, err = process.communicate(timeout=TIMEOUT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run_forked(self, arguments: list[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
        """Run as under torchrun, but much faster. Tests of how users start the script call ``run``."""
        return forked_script.run_script(SCRIPT, arguments, ranks, self.path, TIMEOUT)

    def metrics(self, output: str) -> dict[int, dict[str, Any]]:
        """The records of a run by step; a step that appears twice fails."""
        records = [json.loads(line) for line in (self.path / output / "metrics.jsonl").read_text().splitlines()]
        assert len({record["step"] for record in records}) == len(records)
        return {record["step"]: record for record in records}
