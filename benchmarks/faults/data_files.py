"""Trials of single files: each reader with every kind of damage and of unusual but sound files."""

from __future__ import annotations

import builtins
import codecs
import gzip
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import zstandard

from benchmarks.faults.data_reading import (
    FORMATS,
    ROWS,
    Reader,
    Rows,
    as_parquet,
    named,
    numbered,
    read_rows,
    read_texts,
    trial,
)
from benchmarks.faults.trial import Trial

DEEP = 100_000
LONG = "word " * 60_000  # 300 KB


def file_trials() -> Iterator[Trial]:
    """Every format for fine-tuning, and for pre-training."""
    for kind, read in (("rows", read_rows), ("texts", read_texts)):
        for suffix in ("csv", "jsonl", "json", "parquet") if kind == "rows" else ("txt", "jsonl", "json", "parquet"):

            def made(rows: Rows, kind: str = kind, suffix: str = suffix) -> Any:
                texts = [text for text, _ in rows]
                if suffix == "txt":
                    return ["".join(f"{text}\n" for text in texts)]
                return numbered(rows) if kind == "rows" else texts

            for fault, name, content, expected in _files(suffix, made):
                yield trial(f"{kind}: {suffix}, {fault}", named(name, content), read, expected)
            for fault, write in PLACES.items():
                yield trial(f"{kind}: {suffix}, {fault}", partial(write, name=f"a.{suffix}"), read)
            sound = named(f"a.{suffix}", FORMATS[suffix](ROWS))
            yield trial(f"{kind}: {suffix}, not readable", sound, partial(closed, read))


def _files(suffix: str, made: Callable[[Rows], Any]) -> Iterator[tuple[str, str, bytes, Any]]:
    """What may be wrong with a file: the fault, its name, its contents, and what must come of it."""
    sound, name = FORMATS[suffix](ROWS), f"a.{suffix}"
    yield "sound", name, sound, made(ROWS)
    yield "empty", name, b"", None
    members = gzip.compress(sound[:99]) + gzip.compress(sound[99:])
    yield "two gzip members", f"{name}.gz", members, None if suffix == "parquet" else made(ROWS)
    if suffix == "parquet":
        yield from _parquet_files(sound, made)
        return
    yield "only blank lines", name, b"\n\r\n\n" if suffix != "txt" else b"", None
    yield "bytes that are no text", name, bytes(range(256)) * 9, None
    yield "one byte that is not UTF-8", name, sound.replace(b"number 7", b"number \xff"), None
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        yield f"{encoding} with a mark", name, sound.decode().encode(encoding), made(ROWS)
    yield "a mark, compressed", f"{name}.gz", gzip.compress(codecs.BOM_UTF8 + sound), made(ROWS)
    yield "UTF-16 cut in a character", name, sound.decode().encode("utf-16")[:-1], None
    yield "gzip cut short", f"{name}.gz", gzip.compress(sound)[:-12], None
    yield "gzip with a flipped bit", f"{name}.gz", _flipped(gzip.compress(sound)), None
    yield "zstandard cut short", f"{name}.zst", zstandard.compress(sound)[:-5], None
    frames = zstandard.compress(sound[:99]) + zstandard.compress(sound[99:])
    yield "two zstandard frames", f"{name}.zst", frames, made(ROWS)
    yield "gzip called zst", f"{name}.zst", gzip.compress(sound), None
    yield "not compressed, but called gz", f"{name}.gz", sound, None
    yield "a text of 300 KB", name, FORMATS[suffix]([*ROWS, (LONG, "class 0")]), made([*ROWS, (LONG, "class 0")])
    if suffix == "txt":
        return
    yield "line ends of Windows", name, sound.replace(b"\n", b"\r\n"), made(ROWS)
    yield "cut in the middle", name, sound[: sound.rindex(b"number") + 3], None
    yield "another column", name, FORMATS[suffix](ROWS, ("body", "label")), None
    if suffix == "csv":
        yield "line ends of old Macs", name, sound.replace(b"\n", b"\r"), made(ROWS)
        yield "two columns of a name", name, sound.replace(b"text,label", b"text,text"), None
        yield "an open quote", name, sound + b'"never closed,class 1\n', None
        yield "a comma without quotes", name, sound + b"one, two,class 1\n", None
        yield (
            "semicolons",
            name,
            sound.replace(b'","', b'";"').replace(b'",', b'";').replace(b",label", b";label"),
            None,
        )
        return
    yield "lists instead of objects", name, b'[["a", 1], ["b", 2]]' if suffix == "json" else b'"a"\n', None
    yield "nested too deeply", name, b"[" * DEEP + b"]" * DEEP if suffix == "json" else b'{"a":' * DEEP, None
    yield "a number as text", name, FORMATS[suffix]([*ROWS, (3, "class 0")]), None
    yield "half a surrogate pair", name, FORMATS[suffix]([*ROWS, ("\ud800", "class 0")]), None
    yield "null as text", name, FORMATS[suffix]([*ROWS, (None, "class 0")]), None
    yield "more behind it", name, sound + b"]", None


def _parquet_files(sound: bytes, made: Callable[[Rows], Any]) -> Iterator[tuple[str, str, bytes, Any]]:
    yield "cut short", "a.parquet", sound[:-20], None
    yield "a damaged page", "a.parquet", sound[:30] + bytes(40) + sound[70:], None
    yield "bytes that are no parquet", "a.parquet", bytes(range(256)) * 9, None
    yield "another column", "a.parquet", as_parquet(ROWS, ("body", "label")), None
    yield "null as text", "a.parquet", as_parquet([*ROWS, (None, "class 0")]), None
    yield "a text of 300 KB", "a.parquet", as_parquet([*ROWS, (LONG, "class 0")]), made([*ROWS, (LONG, "class 0")])


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def _missing(folder: Path, name: str) -> Path:
    return folder / name


def _empty_folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _broken_link(folder: Path, name: str) -> Path:
    (folder / name).symlink_to(folder / "nowhere")
    return folder / name


def _loop(folder: Path, name: str) -> Path:
    (folder / name).symlink_to(folder / name)
    return folder / name


def _pipe(folder: Path, name: str) -> Path:
    os.mkfifo(folder / name)
    return folder / name


PLACES: dict[str, Callable[..., Path]] = {
    "missing": _missing,
    "an empty folder": _empty_folder,
    "a broken link": _broken_link,
    "a link to itself": _loop,
    "a pipe": _pipe,
}


def closed(read: Reader, path: Path) -> Any:
    """Read data of which one file or folder may not be read; root may read all, so that it is made up."""
    place = path if path.is_file() else path / "closed"
    opened, scanned = builtins.open, os.scandir

    def refuse(function: Callable[..., Any], which: Any, *more: Any, **options: Any) -> Any:
        if str(which) == str(place):
            raise PermissionError(13, "Permission denied", str(which))
        return function(which, *more, **options)

    parquet = mock.patch("pyarrow.parquet.ParquetFile", partial(refuse, pyarrow.parquet.ParquetFile))
    files = mock.patch("builtins.open", partial(refuse, opened))
    with parquet, files, mock.patch("os.scandir", partial(refuse, scanned)):
        return read(path)
