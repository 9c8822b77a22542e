"""Reading a local file as text: decompressed, decoded, and in pieces, so that no file is in memory as a whole.

Text is UTF-8. A byte order mark at the start of a file, as spreadsheet programs write it, is not part of the text; that
of UTF-16 or UTF-32 decides the encoding.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from ds_lowrank.data.errors import DataError, NotTextError

COMPRESSIONS = (".gz", ".zst")
MARKS = {  # in this order, as that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LONGEST_WINDOW = 2**31  # of zstandard's --long=31; the library's own limit is a sixteenth of it
COMPRESSED_PIECE = 2**10  # whose content can be ten thousand times as long


def read_text(path: Path) -> str:
    """Read a whole file.

    Raises:
        NotTextError: the file is not text.
        DataError: the file cannot be read.
    """
    with opened_text(path) as file:
        return file.read()


@contextmanager
def opened_text(path: Path, newline: str = "\n") -> Iterator[io.TextIOWrapper]:
    """Open a file, compressed or not, to read its text.

    Args:
        path: the file.
        newline: as in :func:`open`: lines end at line feeds only, or for ``""`` at carriage returns too. Nothing is
            translated.

    Raises:
        NotTextError: while reading: the file is not text.
        DataError: the file cannot be read.
    """
    with opened_bytes(path) as file:
        encoding = _encoding(cast(Any, file).peek(4))
        try:
            with io.TextIOWrapper(file, encoding, newline=newline) as text:
                yield text
        except UnicodeError as error:
            where, kind = (path, encoding.upper()) if encoding != "utf-8" else (_first_bad_line(path), "UTF-8")
            raise NotTextError(f"{where}: not {kind} text ({error}); convert the file to UTF-8") from error


def marked_encoding(path: Path) -> str:
    """The encoding of an uncompressed file by its byte order mark: ``utf-8`` if it has none.

    Raises:
        DataError: the file cannot be read.
    """
    with opened_bytes(path) as file:
        return _encoding(file.read(4))


def _encoding(head: bytes) -> str:
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")


@contextmanager
def opened_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read its decompressed bytes.

    Raises:
        DataError: the file cannot be read, also while reading.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield cast(IO[bytes], file)
        elif suffix == ".zst":
            with open(path, "rb") as compressed, io.BufferedReader(_Decompressed(compressed), 1 << 20) as frames:
                yield frames
        else:
            with open(path, "rb") as plain:
                yield plain
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be decompressed, it may be damaged or cut short ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


class _Decompressed(io.RawIOBase):
    """The contents of consecutive zstandard frames. The library's own reader takes a truncated frame for the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._library = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW)
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes; return how many, 0 at the end."""
        while not self._content:
            self._compressed = self._compressed or self._file.read(COMPRESSED_PIECE)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            self._frame = self._frame or self._library.decompressobj()
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size


def _first_bad_line(path: Path) -> str:
    """The first line that is not UTF-8, as a decoder that reads ahead cannot tell it."""
    with opened_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{path}, line {number}"
    return str(path)
