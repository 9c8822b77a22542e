"""Keeping the best model so far as a Hugging Face folder.

    OUTPUT/best/              configuration, weights, tokenizer
    OUTPUT/best/best.json     {"metric": ..., "value": ..., "step": ...}

The folder is replaced as a whole: a kill leaves the earlier one or, for a short moment, none, but never half of one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from ds_lowrank.checkpoint.export import Savable, export
from ds_lowrank.collectives import broadcast_from_rank0
from ds_lowrank.errors import CheckpointError
from ds_lowrank.finetuning.metrics import better
from ds_lowrank.training.console import explained

FOLDER = "best"
FILE = "best.json"


class Best:
    """The best model so far. It is part of checkpoints, so that a resumed run knows the value to beat.

    Args:
        engine: the engine of the model.
        tokenizer: the tokenizer to write with the model.
        output: the output folder of the run.
        metric: the name of the metric that decides.

    Attributes:
        metric: the name of the metric that decides.
    """

    def __init__(self, engine: DeepSpeedEngine, tokenizer: Savable, output: Path, metric: str) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._folder = output / FOLDER
        self.metric = metric
        self._found: dict[str, Any] | None = None

    @property
    def found(self) -> dict[str, Any] | None:
        """The contents of best.json; None before the first evaluation whose value is not NaN."""
        return self._found

    def consider(self, step: int, value: float) -> None:
        """Write the current model if its metric is the best so far. Collective.

        Args:
            step: the number of the step just taken.
            value: the metric, the same number on every rank.

        Raises:
            OutputError: it cannot be written.
            RemoteError: another rank failed.
        """
        if not better(self.metric, value, None if self._found is None else self._found["value"]):
            return
        self._found = {"metric": self.metric, "value": value, "step": step}
        with explained(self._folder):
            export(self._engine, self._tokenizer, self._folder, {FILE: json.dumps(self._found, indent=2) + "\n"})

    def state_dict(self) -> dict[str, Any]:
        """Metric, value and step of the best model, for a checkpoint."""
        return {"found": self._found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best value from a checkpoint, if the folder still contains that model. Collective.

        It does not if the run branches off into another output folder, or if evaluations after the checkpoint have
        overwritten the model. The next evaluation is then the best so far.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            CheckpointError: on rank 0, best.json cannot be read.
            RemoteError: on the other ranks.
        """
        on_disk = broadcast_from_rank0(self._read)
        self._found = state["found"] if on_disk == state["found"] else None

    def _read(self) -> dict[str, Any] | None:
        path = self._folder / FILE
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except ValueError:
            raise CheckpointError(
                f"{path} is damaged: delete {self._folder} to continue without the best model so far"
            ) from None
        return found
