"""Reading one local file: text, JSON, JSON Lines, CSV or parquet, uncompressed or compressed with gzip or zstandard."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
import pyarrow.parquet

from ds_lowrank.data.errors import DataError

COMPRESSIONS = (".gz", ".zst")
RECORD_FORMATS = (".jsonl", ".json", ".parquet")
ROW_FORMATS = (*RECORD_FORMATS, ".csv")


def file_format(path: Path) -> str:
    """The lower-case suffix that names the file's format, without a compression suffix: ``.json`` for ``a.json.gz``."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


def holds_records(path: Path) -> bool:
    """Whether the file is read as records (JSON, JSON Lines or parquet) and not as one text."""
    return file_format(path) in RECORD_FORMATS


def read_text(path: Path) -> str:
    """Read the whole file as UTF-8 text.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
        DataError: the file cannot be read.
    """
    with _opened(path) as file:
        return file.read().decode("utf-8")


def read_records(path: Path, text_field: str) -> Iterator[str]:
    """Iterate over the ``text_field`` of every record, in order.

    Raises:
        DataError: the file or a record cannot be used; the message names the record.
    """
    records = _parquet_records(path, text_field) if file_format(path) == ".parquet" else _json_records(path)
    for number, record in enumerate(records):
        yield record_text(record, text_field, f"{path}, record {number}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all records as dicts keyed by column name, in order.

    The first line of a CSV file names the columns, and its values are strings.

    Raises:
        DataError: the file or a record cannot be used; the message names the record.
    """
    if file_format(path) == ".csv":
        return _csv_rows(path)
    if file_format(path) == ".parquet":
        try:
            return cast(list[dict[str, Any]], pyarrow.parquet.read_table(path).to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as parquet, it may be damaged or cut short ({error})") from error
    rows = list(_json_records(path))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, record {number}: expected an object with columns, found {type(row).__name__}")
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file of UTF-8 text ({error})") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise DataError(f"{path}, record {number}: not as many values as columns in the first line; quote commas")
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
    text = cast(str, record[text_field])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text contains half of a surrogate pair ({error}); remove it") from error
    return text


def content_hash(path: Path) -> str:
    """The SHA-256 of the file's bytes, in hex.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of the file. Every failure to read them is raised as a ``DataError``."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield cast(IO[bytes], file)
        elif suffix == ".zst":
            # pyarrow rather than zstandard, whose reader mistakes a truncated frame for the end of the data.
            with io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"), 1 << 20) as file:
                yield cast(IO[bytes], file)
        else:
            with open(path, "rb") as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, it may be damaged or cut short ({error})") from error


def _json_records(path: Path) -> Iterator[Any]:
    """The elements of a JSON array if the file starts with ``[``, else one JSON value per line, skipping blank ones."""
    with _opened(path) as file:
        lines = enumerate(file, start=1)
        for number, line in lines:
            if not line.strip():
                continue
            if line.lstrip().startswith(b"["):
                yield from _parsed(line + file.read(), f"{path}, from line {number}")
                return
            yield _parsed(line, f"{path}, line {number}")


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def _parquet_records(path: Path, text_field: str) -> Iterator[Any]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise DataError(f"{path}: no column {text_field!r} (columns: {', '.join(names)}); name the text field")
            for batch in file.iter_batches(columns=[text_field]):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet, it may be damaged or cut short ({error})") from error
