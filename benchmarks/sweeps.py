"""Sweeps of one value, and runs that a file of ``--json`` keeps, so that a long command may be stopped and repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

from benchmarks.common import Numbers, write_json
from benchmarks.runs import Records

Setting = TypeVar("Setting")
"""A frozen dataclass whose values JSON can hold."""


def around(value: float) -> tuple[float, float, float]:
    """Return a value, half of it and twice of it."""
    return value, value / 2, 2 * value


def best_on_line(first: float, loss: Callable[[float], float], more: int) -> float:
    """Return the value with the lowest loss of one, its half and its double, and up to ``more`` values beyond."""
    losses = {value: loss(value) for value in around(first)}
    while True:
        tried = sorted(losses)
        winner = min(tried, key=losses.__getitem__)
        if more == 0 or winner not in (tried[0], tried[-1]):
            return winner
        beyond = winner / 2 if winner == tried[0] else 2 * winner
        losses[beyond] = loss(beyond)
        more -= 1


class KeptRuns(Generic[Setting]):
    """The records of runs by their settings, in a file that is written after every run.

    Args:
        file: The file of ``--json``; None keeps nothing beyond this process.
        shared: What all runs have in common.
        kind: The class of the settings.
        keys: What the file has of each record.

    Raises:
        SystemExit: The file has runs that have something else in common.
    """

    def __init__(self, file: Path | None, shared: Mapping[str, Any], kind: type[Setting], keys: Sequence[str]) -> None:
        self._file, self.shared, self._keys = file, dict(shared), tuple(keys)
        self._writing = Lock()
        self.found: dict[Setting, Records] = {}
        if file is None or not file.exists():
            return
        record = json.loads(file.read_text())
        if record.get("shared") != self.shared:
            raise SystemExit(f"{file} has runs of {record.get('shared')}, this command makes runs of {self.shared}")
        self.found |= {kind(**run["setting"]): run["records"] for run in record["runs"]}

    def get(self, setting: Setting, make: Callable[[], Records]) -> Records:
        """Return the records of a run, which is made if it is not known."""
        if setting not in self.found:
            self.found[setting] = make()
            if self._file is not None:
                with self._writing:
                    write_json(self._file, self.as_record())
        return self.found[setting]

    def as_record(self) -> dict[str, Any]:
        """Return what all runs have in common, and each run, as they are written."""
        runs: Numbers = [
            {"setting": vars(setting), "records": [self._short(record) for record in records]}
            for setting, records in list(self.found.items())
        ]
        return {"shared": self.shared, "runs": runs}

    def _short(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {key: record[key] for key in self._keys if key in record}
