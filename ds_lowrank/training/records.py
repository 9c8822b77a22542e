"""metrics.jsonl: one JSON object for each logged step. This file imports neither torch nor DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any

FILE = "metrics.jsonl"
NEEDED = {
    **dict.fromkeys(("step", "tokens", "skipped_steps"), (int,)),
    **dict.fromkeys(("seconds", "memory_gib"), (int, float)),
    "loss": (int, float, NoneType),
}
"""What plot and summary read of every record, and its types."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics file, ignoring a last line that a crash truncated.

    Raises:
        ValueError: another line is not a record.
    """
    records = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, or not text
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a JSON object; repair or remove that line") from None
            continue
        if not isinstance(record, dict) or not all(type(record.get(key)) in kinds for key, kinds in NEEDED.items()):
            raise ValueError(f"{path}, line {number}: not a record of a step; repair or remove that line")
        records.append(record)
    return records
