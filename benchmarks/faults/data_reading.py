"""How trials of bad data read, and judge what comes of it; sound data in every format."""

from __future__ import annotations

import csv
import io
import json
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.faults.trial import Outcome, Trial
from ds_lowrank.data.rows import open_rows
from ds_lowrank.data.sources import open_source
from ds_lowrank.finetuning.tasks import make_task

Rows = list[tuple[Any, Any]]
ROWS: Rows = [(f"text number {number}, with a comma", f"class {number % 3}") for number in range(40)]
Reader = Callable[[Path], Any]
Write = Callable[[Path], Path]


def judge(folder: Path, *, write: Write, read: Reader, expected: Any, name: str | None = None) -> Outcome:
    """Write data, read them and judge what comes of it.

    Args:
        folder: where to write.
        write: writes the data; returns the path to read.
        read: reads them.
        expected: what must come of it; None if they must be refused.
        name: what the message must contain; None for the name of the file.
    """
    path = write(folder)
    try:
        found = read(path)
    except (ValueError, OSError) as error:
        message = str(error)
        if expected is not None:
            return Outcome("other result", f"refused: {message}")
        if isinstance(error, UnicodeError) or "\n" in message or (name or path.name) not in message:
            return Outcome("no message", f"{type(error).__name__}: {message}")
        return Outcome("refused", message)
    except Exception as error:
        return Outcome("traceback", f"{type(error).__name__}: {error}")
    if expected is None:
        return Outcome("accepted", f"{len(found)} items")
    return Outcome("same result") if found == expected else Outcome("other result", f"{str(found)[:200]}")


def read_rows(path: Path, column: str = "label") -> Rows:
    """Texts and labels as launch/finetune.py gets them."""
    rows = open_rows(str(path), path, 0.1, 0)
    options = {"text_column": None, "prompt_column": None, "label_column": column, "task": "classification"}
    task: Any = make_task(Namespace(data=str(path), **options), rows)
    return [(row["text"], task.labels.number(row[column], row.where)) for row in rows.train]


def read_texts(path: Path) -> list[Any]:
    """Documents as launch/pretrain.py gets them with nothing held out."""
    return list(open_source(str(path), "all").documents())


def as_csv(rows: Rows, columns: tuple[str, str] = ("text", "label")) -> bytes:
    """Rows as a CSV file."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return file.getvalue().encode()


def as_jsonl(rows: Rows, columns: tuple[str, str] = ("text", "label")) -> bytes:
    """Rows as JSON Lines."""
    return b"".join(json.dumps(dict(zip(columns, row, strict=True))).encode() + b"\n" for row in rows)


def as_json(rows: Rows, columns: tuple[str, str] = ("text", "label")) -> bytes:
    """Rows as a JSON array."""
    return json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1).encode()


def as_parquet(rows: Rows, columns: tuple[str, str] = ("text", "label")) -> bytes:
    """Rows as a parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), file)
    return file.getvalue()


FORMATS: dict[str, Callable[..., bytes]] = {
    "csv": as_csv,
    "jsonl": as_jsonl,
    "json": as_json,
    "parquet": as_parquet,
    "txt": lambda rows: "".join(f"{text}\n" for text, _ in rows).encode(),
}


def named(name: str, content: bytes) -> Write:
    """What writes a file of that name."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def trial(name: str, write: Write, read: Reader, expected: Any = None, message: str | None = None) -> Trial:
    """A trial that is judged by :func:`judge`, and is fast enough for ``make test``."""
    run = partial(judge, write=write, read=read, expected=expected, name=message)
    return Trial(name, run, compact=True)


def numbered(rows: Rows) -> Rows:
    """What classification makes of the labels of ``ROWS``."""
    return [(text, int(str(label).split()[-1])) for text, label in rows]
