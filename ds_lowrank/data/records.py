"""Records of one local file of JSON, JSON Lines, CSV or parquet, each with the place it comes from."""

from __future__ import annotations

import csv
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.files import file_format
from ds_lowrank.data.json_records import json_records
from ds_lowrank.data.text import COMPRESSIONS, opened_text

PARQUET_ROWS = 1024  # that are read at a time


class Row(dict[str, Any]):
    """A record keyed by column name.

    Args:
        columns: its values.
        where: the place it comes from, for messages: its file and line, or its number in a data set.
    """

    __slots__ = ("where",)

    def __init__(self, columns: Mapping[str, Any], where: str) -> None:
        super().__init__(columns)
        self.where = where


def read_texts(path: Path, text_field: str) -> Iterator[str]:
    """Iterate over the ``text_field`` of every record of JSON, JSON Lines or parquet, in order.

    Raises:
        DataError: the file or a record cannot be used; the message names the record.
    """
    records = _parquet_records(path, text_field) if file_format(path) == ".parquet" else json_records(path)
    for where, record in records:
        yield record_text(record, text_field, where)


def read_rows(path: Path) -> list[Row]:
    """Read all records, in order.

    The first line of a CSV file names the columns, and its values are strings.

    Raises:
        DataError: the file or a record cannot be used; the message names the record.
    """
    if file_format(path) == ".csv":
        return _csv_rows(path)
    records = _parquet_records(path) if file_format(path) == ".parquet" else json_records(path)
    rows = []
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with columns, found {type(record).__name__}")
        rows.append(Row(record, where))
    return rows


def record_text(record: Any, text_field: str, where: str) -> str:
    """The text of one record.

    Args:
        record: the parsed record.
        text_field: the field that contains the text.
        where: names the record in error messages.

    Raises:
        DataError: the record has no such field, or its value is not Unicode text.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with a {text_field!r} field, found {type(record).__name__}")
    if not isinstance(record.get(text_field), str):
        fields = ", ".join(sorted(map(str, record))) or "none"
        raise DataError(f"{where}: no text in the field {text_field!r} (fields: {fields}); name the text field")
    return checked_text(record[text_field], where)


def checked_text(value: Any, where: str) -> str:
    """Check that a value is text that can be encoded.

    Args:
        value: the value.
        where: names the record in error messages.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} contains {reprlib.repr(value)}, which is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text contains half of a surrogate pair ({error}); remove it") from error
    return value


def _csv_rows(path: Path) -> list[Row]:
    limit = csv.field_size_limit(sys.maxsize)  # a field of any length, not the module's 128 KiB
    rows: list[Row] = []
    reader: csv.DictReader[str] | None = None
    try:
        with opened_text(path, newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: not as many values as columns in the first line; quote commas")
                rows.append(Row(row, where))
    except csv.Error as error:
        line = reader.reader.line_num if reader is not None else 1  # DictReader's own is that of the last row
        raise DataError(f"{path}, line {line}: not CSV ({error}); quote values, and double quotes in them") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _parquet_records(path: Path, column: str | None = None) -> Iterator[tuple[str, Any]]:
    """Iterate over where each row is, and its values: those of one column, or all."""
    if path.suffix.lower() in COMPRESSIONS:
        raise DataError(f"{path}: a parquet file is compressed inside, and cannot be read from an archive: unpack it")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(path, names)
            if column is not None and column not in names:
                raise DataError(f"{path}: no column {column!r} (columns: {', '.join(names)}); name the text field")
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=None if column is None else [column]):
                for record in batch.to_pylist():
                    yield f"{path}, record {number}", record
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet, it may be damaged or cut short ({error})") from error


def _check_columns(path: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"{path}: several columns are called {twice[0]!r}; rename them")
