"""The best model so far, kept as a Hugging Face folder.

    OUTPUT/best/              configuration, weights, tokenizer
    OUTPUT/best/best.json     {"metric": ..., "value": ..., "step": ...}

The folder is replaced as a whole: a kill leaves the earlier one, or for a moment none, never half of one.
"""

import json
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from ds_lowrank.checkpoint.export import Savable, export
from ds_lowrank.collectives import broadcast_from_rank0
from ds_lowrank.finetuning.metrics import better

FOLDER = "best"
FILE = "best.json"


class Best:
    """Decides at every evaluation. Part of a checkpoint, so that a resumed run knows what there was to beat."""

    def __init__(self, engine: DeepSpeedEngine, tokenizer: Savable, output: Path, metric: str) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._folder = output / FOLDER
        self.metric = metric
        self._found: dict[str, Any] | None = None

    @property
    def found(self) -> dict[str, Any] | None:
        """What best.json holds; None before the first evaluation that gave a number."""
        return self._found

    def consider(self, step: int, value: float) -> None:
        """Write the model of this step if the metric, the same number on every rank, is better than before.

        Collective.
        """
        if not better(self.metric, value, None if self._found is None else self._found["value"]):
            return
        self._found = {"metric": self.metric, "value": value, "step": step}
        export(self._engine, self._tokenizer, self._folder, {FILE: json.dumps(self._found, indent=2) + "\n"})

    def state_dict(self) -> dict[str, Any]:
        return {"found": self._found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint remembers, if its weights are there: not if the folder holds other ones.

        That is so in a run that branches off into another output folder, and where evaluations after the checkpoint
        have overwritten them: then the next evaluation is the best so far. Collective.
        """
        on_disk = broadcast_from_rank0(self._read)
        self._found = state["found"] if on_disk == state["found"] else None

    def _read(self) -> dict[str, Any] | None:
        path = self._folder / FILE
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
        return found
