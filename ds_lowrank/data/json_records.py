"""Records of a JSON file, one at a time: an array's elements, or one value per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import chain
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.text import opened_text

PIECE = 2**20
SPACE = " \t\r\n"
DECODER = json.JSONDecoder()
# For whole numbers of more digits than Python converts by default; nothing here computes with them.
LENIENT = json.JSONDecoder(parse_int=float)


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Iterate over an array's elements if the file starts with ``[``, else over one value per line, without blank ones.

    Yields:
        Where the record is, for messages, and its value.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    with opened_text(path) as file:
        number, first = 1, file.read(1)
        while first and first in SPACE:
            number += first == "\n"
            first = file.read(1)
        if first == "[":
            yield from _elements(path, file)
            return
        lines = chain([first + file.readline()], iter(file.readline, ""))
        for line_number, line in enumerate(lines, start=number):
            start = _after_space(line, 0)
            if start < len(line):
                where = f"{path}, line {line_number}"
                yield where, _only_value(line, start, where)


def _only_value(line: str, start: int, where: str) -> Any:
    try:
        value, end = _value(line, start)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if _after_space(line, end) < len(line):
        raise DataError(f"{where}: not JSON (more than one value: {line[end : end + 20]!r})")
    return value


def _elements(path: Path, file: TextIOWrapper) -> Iterator[tuple[str, Any]]:
    """The elements of an array, whose bracket has been read. No more is in memory than a piece, or a long element."""
    text, number, position = "", 0, 0
    while True:
        where = f"{path}, record {number}"
        start = _after_space(text, position)
        if number == 0 and text[start : start + 1] == "]":
            end = start
            break
        try:
            value, end = _value(text, start)
            end = _after_space(text, end)
            if text[end] not in ",]":
                raise json.JSONDecodeError("expected ',' or ']'", text, end)
        except RecursionError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        except (json.JSONDecodeError, IndexError) as error:  # incomplete, or wrong
            more = file.read(max(PIECE, len(text) - start))
            if not more:
                reason = getattr(error, "msg", "the array is not closed")
                raise DataError(f"{where}: not JSON ({reason}); the file may be cut short") from error
            text, position = text[start:] + more, 0
            continue
        yield where, value
        number, position = number + 1, end + 1
        if text[end] == "]":
            break
    rest = text[end + 1 :] or file.read(PIECE)
    while rest:
        if rest.strip():
            raise DataError(f"{path}: not JSON (more after the array: {rest.strip()[:20]!r})")
        rest = file.read(PIECE)


def _value(text: str, start: int) -> tuple[Any, int]:
    """One value and where it ends."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return LENIENT.raw_decode(text, start)


def _after_space(text: str, start: int) -> int:
    end: int = WHITESPACE.match(text, start).end()
    return end
