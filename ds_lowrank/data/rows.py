"""Where fine-tuning examples come from: ``open_rows`` turns a data spec into training and validation rows.

| spec | rows | validation |
|---|---|---|
| ``stdlib-functions`` | functions of the standard library (see ``functions.py``) | a fraction of the rows |
| ``stdlib-order`` | pairs of halves of their bodies (see ``halves.py``) | a fraction of the files |
| ``stdlib-parameters`` | their bodies (see ``parameters.py``) | a fraction of the files |
| a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file | its records | a second file, or a fraction of the rows |
| ``glue:TASK`` | the data set of that task, from the hub | its own split; MNLI has two |
| ``hf:NAME[:CONFIG]`` | a data set of the hub, or a local folder, through ``datasets`` | its ``validation`` split |

For the last, ``Splits`` can name others. A fraction of the rows is chosen by a hash of the row's contents and the seed,
so that equal rows are never in both splits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ds_lowrank.collectives import first_on_node
from ds_lowrank.data.built_in import BUILT_IN
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.files import ROW_FORMATS, file_format
from ds_lowrank.data.glue import GLUE, HUB_NAME
from ds_lowrank.data.library import HELD_OUT
from ds_lowrank.data.records import Row, read_rows
from ds_lowrank.data.split import split_of
from ds_lowrank.data.stream import cause, name_and_config

NO_SPLIT = "none"
"""As the name of the validation split: a fraction of the training split is held out."""


class Splits(NamedTuple):
    """The splits of a data set to read.

    Attributes:
        train: name of the split to train on.
        validation: name of the split for validation, or ``NO_SPLIT``.
    """

    train: str = "train"
    validation: str = "validation"


USUAL = Splits()


@dataclass(frozen=True)
class Rows:
    """The rows of both splits.

    Attributes:
        train: the training rows.
        validation: the rows of each validation split, keyed by the prefix of its metrics.
        classes: for columns of integer labels whose class names are known, those names, keyed by column.
    """

    train: list[Row]
    validation: dict[str, list[Row]]
    classes: dict[str, list[str]] = field(default_factory=dict)


def open_rows(spec: str, validation: Path | None, held_out: float, seed: int, splits: Splits = USUAL) -> Rows:
    """Read the rows of both splits. Collective: one process of each node reads first, so that only it downloads.

    Args:
        spec: the data spec (see the table above).
        validation: a file of validation rows; only if ``spec`` is a file too.
        held_out: the fraction of a single file that is held out, 0 to 1.
        seed: seed of the choice of the rows that are held out.
        splits: the splits of ``hf:NAME``.

    Raises:
        DataError: the data do not exist, cannot be read, or leave a split empty.
        RemoteError: another rank failed.
    """
    return first_on_node(lambda: _read(spec, validation, held_out, seed, splits))


def _read(spec: str, validation: Path | None, held_out: float, seed: int, splits: Splits) -> Rows:
    path = Path(spec).expanduser()
    local = not spec.startswith(("glue:", "hf:")) and spec not in BUILT_IN
    if validation is not None and not local:
        raise DataError(f"{spec!r} has its own validation split: leave --validation out")
    if spec in BUILT_IN:
        task = BUILT_IN[spec]
        rows = _held_out(_numbered(task.rows(), spec), HELD_OUT, seed=0, column=task.held_out_by)
    elif spec.startswith("glue:"):
        rows = _glue(spec)
    elif spec.startswith("hf:"):
        whole = splits.validation == NO_SPLIT
        rows = _from_datasets(spec, splits.train, {} if whole else {"": splits.validation}, *name_and_config(spec))
        if whole:
            parts = _held_out(rows.train, held_out, seed)
            rows = Rows(parts.train, parts.validation, rows.classes)
    elif validation is not None:
        rows = Rows(_file(path), {"": _file(validation.expanduser())})
    else:
        rows = _held_out(_file(path), held_out, seed)
    for split, found in {"train": rows.train, **rows.validation}.items():
        if not found and split != "train" and validation is not None:
            raise DataError(f"--validation {str(validation)!r} holds no rows: give more data")
        if not found:
            raise DataError(
                f"{spec!r} holds no rows {'to train on' if split == 'train' else 'for validation'}: give more data, "
                "or a file of its own as --validation"
            )
    return rows


def _file(path: Path) -> list[Row]:
    if not os.path.isfile(path):
        known = ", ".join(f"'{name}'" for name in (*BUILT_IN, "glue:TASK"))
        raise DataError(f"no data at '{path}': give an existing file, {known} or 'hf:NAME[:CONFIG]'")
    if file_format(path) not in ROW_FORMATS:
        raise DataError(f"{path}: not a format with columns; give {', '.join(ROW_FORMATS)}")
    return read_rows(path)


def _numbered(rows: Iterable[Mapping[str, Any]], name: str) -> list[Row]:
    return [Row(row, f"{name}, row {number}") for number, row in enumerate(rows)]


def _held_out(rows: Sequence[Row], share: float, seed: int, column: str | None = None) -> Rows:
    """Split rows by the hash of their whole contents and the seed, or by that of one column."""

    def split(row: Row) -> str:
        if column is not None:
            return split_of(row[column], share)
        return split_of(f"{seed}\n{json.dumps(row, sort_keys=True, default=str)}", share)

    splits = [split(row) for row in rows]
    parts = {
        name: [row for row, where in zip(rows, splits, strict=True) if where == name]
        for name in ("train", "validation")
    }
    return Rows(parts["train"], {"": parts["validation"]})


def _glue(spec: str) -> Rows:
    task = spec.removeprefix("glue:")
    if task not in GLUE:
        raise DataError(f"{spec!r}: no such task; GLUE has {', '.join(GLUE)}")
    return _from_datasets(spec, "train", GLUE[task].validation, HUB_NAME, task)


def _from_datasets(spec: str, train: str, validation: Mapping[str, str], name: str, config: str | None) -> Rows:
    import datasets

    try:
        found = datasets.load_dataset(name, config)
    except Exception as error:  # its own classes, or those of ``requests`` or the hub's client
        raise DataError(
            f"{spec!r} cannot be loaded ({cause(error)}); check the name and the network, or download it elsewhere and "
            "give the files"
        ) from error
    for split in (train, *validation.values()):
        if split not in found:
            raise DataError(
                f"{spec!r} has no {split!r} split (it has: {', '.join(found)}): choose with --train-split and "
                "--validation-split"
            )
    classes = {
        column: list(feature.names)
        for column, feature in found[train].features.items()
        if isinstance(feature, datasets.ClassLabel)
    }

    def rows(split: str) -> list[Row]:
        # Without the mark at the start of a text file, which ``datasets`` does not remove.
        unmarked = (
            {column: value.removeprefix("\ufeff") if isinstance(value, str) else value for column, value in row.items()}
            for row in found[split].to_list()
        )
        return _numbered(unmarked, f"{spec!r}, {split} split")

    return Rows(rows(train), {prefix: rows(split) for prefix, split in validation.items()}, classes)
