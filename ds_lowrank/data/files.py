"""Reads one local file: plain text, JSON, JSON Lines, CSV or parquet, as it is or compressed with gzip or zstandard."""

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
    """The suffix that says what the file holds, looking through one compression suffix: `.json` for `a.json.gz`."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


def holds_records(path: Path) -> bool:
    """True for JSON, JSON Lines and parquet; every other file is one text."""
    return file_format(path) in RECORD_FORMATS


def read_text(path: Path) -> str:
    """The whole file as text. Raises UnicodeDecodeError if it is not UTF-8 and DataError if it cannot be read."""
    with _opened(path) as file:
        return file.read().decode("utf-8")


def read_records(path: Path, text_field: str) -> Iterator[str]:
    """The `text_field` of every record, in order. Raises DataError naming the record that is not usable."""
    records = _parquet_records(path, text_field) if file_format(path) == ".parquet" else _json_records(path)
    for number, record in enumerate(records):
        yield record_text(record, text_field, f"{path}, record {number}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All records under their column names, in order. Raises DataError naming the record that is not usable.

    A CSV file has the names in its first line, and its values are text.
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
            raise DataError(f"{path}, record {number}: not as many values as the first line has columns; quote commas")
    return rows


def record_text(record: Any, text_field: str, where: str) -> str:
    """The text of one record. Raises DataError, saying `where`, if there is none or it is not Unicode text."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with a {text_field!r} field, found {type(record).__name__}")
    if not isinstance(record.get(text_field), str):
        fields = ", ".join(sorted(map(str, record))) or "none"
        raise DataError(f"{where}: no text in the field {text_field!r} (fields: {fields}); name the text field")
    text = cast(str, record[text_field])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text holds half of a surrogate pair ({error}); remove it") from error
    return text


def content_hash(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex. Raises DataError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes; whatever goes wrong while they are read is a DataError."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield cast(IO[bytes], file)
        elif suffix == ".zst":
            # pyarrow rather than zstandard, whose reader takes a cut-off frame for the end of the data.
            with io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"), 1 << 20) as file:
                yield cast(IO[bytes], file)
        else:
            with open(path, "rb") as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, it may be damaged or cut short ({error})") from error


def _json_records(path: Path) -> Iterator[Any]:
    """A JSON array's elements if the file starts with `[`, else one JSON value a line (blank lines are skipped)."""
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
