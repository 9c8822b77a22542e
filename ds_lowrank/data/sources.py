"""Where training text comes from: ``open_source`` turns a data spec into the documents of one split.

| spec | documents | held out for validation (see ``split``) |
|---|---|---|
| ``stdlib`` | the ``*.py`` files of this interpreter's standard library | by relative path |
| ``*.jsonl``, ``*.json``, ``*.parquet`` | the ``text`` field of every record | by (file name, record number) |
| a folder | record files as above; any other file is one document; sorted | by path (and record number) |
| any other file | one text, cut into blocks; adjacent blocks of a split form a document | by the block's text |
| ``hf:NAME[:CONFIG]`` | streamed with ``datasets``, from the hub or a local folder | its own ``validation`` split |
| ``megatron:PREFIX`` | token ids of ``PREFIX.bin`` and ``PREFIX.idx`` | by document number |

Files may be compressed (``.gz``, ``.zst``). In a folder, names that start with a dot and text files that are not UTF-8
are skipped. A block consists of whole lines. It ends at the first blank line after 4096 characters, or at the first
line end after 16384 characters.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.files import content_hash, holds_records, read_records, read_text
from ds_lowrank.data.indexed import IndexedTokens
from ds_lowrank.data.split import Split, check_split, split_of
from ds_lowrank.data.stream import TextStream

logger = logging.getLogger("ds_lowrank")

BLOCK_CHARACTERS = 4096
LONGEST_BLOCK_CHARACTERS = 16384


@dataclass(frozen=True)
class TextFiles:
    """One split of a finite, ordered set of local files.

    Attributes:
        name: the data spec, for messages.
        root: the folder of the files; document keys are paths relative to it.
        paths: the files, in document order.
        split: the split of the documents.
        text_field: the field of a record that contains the text.
        whole: True if a text file is one document, False if it is cut into blocks.
    """

    name: str
    root: Path
    paths: tuple[Path, ...]
    split: Split
    text_field: str
    whole: bool

    def documents(self) -> Iterator[str]:
        """Iterate over the non-empty documents of the split.

        Raises:
            DataError: a file or record cannot be used, or the split has no documents.
        """
        empty = True
        for path in self.paths:
            for document in filter(None, self._file_documents(path)):
                empty = False
                yield document
        if empty:
            raise DataError(_no_documents(self.name, self.split))

    def fingerprint(self) -> str:
        """Hash of every path and byte, the text field and the split. Reads all files completely."""
        parts = [f"{self._key(path)} {content_hash(path)}" for path in self.paths]
        return hashlib.sha256("\n".join([*parts, self.text_field, self.split, str(self.whole)]).encode()).hexdigest()

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _file_documents(self, path: Path) -> Iterator[str]:
        key = self._key(path)
        if holds_records(path):
            for number, text in enumerate(read_records(path, self.text_field)):
                if split_of(f"{key}\n{number}") == self.split:
                    yield text
        elif not self.whole:
            yield from text_blocks(_utf8(path), self.split)
        elif split_of(key) == self.split:
            yield from self._utf8_or_nothing(path)

    def _utf8_or_nothing(self, path: Path) -> Iterator[str]:
        try:
            yield read_text(path)
        except UnicodeDecodeError:
            # The standard library's own tests contain such files on purpose, which is not worth a warning.
            level = logging.DEBUG if self.name == "stdlib" else logging.WARNING
            logger.log(level, "%s is not UTF-8 text: left out", path)


Source = TextFiles | TextStream | IndexedTokens


def open_source(spec: str, split: Split, *, text_field: str = "text") -> Source:
    """Open one split of the data that ``spec`` names (see the table above).

    Errors that only reading can reveal (a damaged archive, a record without text, no documents at all) are raised as
    ``DataError`` while the documents are read.

    Args:
        spec: the data spec.
        split: ``train`` or ``validation``.
        text_field: the field that contains the text, in JSON, parquet and ``hf:`` data.

    Raises:
        DataError: the split is unknown, a path does not exist, or a data set cannot be reached or read or does not have
            the split.
    """
    check_split(split)
    if spec.startswith("hf:"):
        return TextStream.open(spec, split, text_field)
    if spec.startswith("megatron:"):
        return IndexedTokens.open(spec, split)
    if spec == "stdlib":
        return _standard_library(split)
    path = Path(spec).expanduser()
    if path.is_dir():
        files = files_below(path, lambda name: name.startswith("."))
        return TextFiles(spec, path, files, split, text_field, whole=True)
    if path.is_file():
        return TextFiles(spec, path.parent, (path,), split, text_field, whole=False)
    raise DataError(
        f"no data at {spec!r}: give an existing file or folder, 'stdlib', 'hf:NAME[:CONFIG]' or 'megatron:PREFIX'"
    )


def text_blocks(text: str, split: Split) -> Iterator[str]:
    """Iterate over the blocks of ``text`` that belong to ``split``, adjacent ones joined.

    The blocks of both splits together are exactly ``text``.
    """
    for owner, blocks in groupby(_blocks(text), key=split_of):
        if owner == split:
            yield "".join(blocks)


def _blocks(text: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= LONGEST_BLOCK_CHARACTERS or (size >= BLOCK_CHARACTERS and not line.strip()):
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _standard_library(split: Split) -> TextFiles:
    root = Path(sysconfig.get_path("stdlib"))

    def left_out(name: str) -> bool:
        # _sysconfigdata_*.py records how this interpreter was built, which differs between builds of one version.
        return name in ("site-packages", "dist-packages") or name.startswith("_sysconfigdata")

    return TextFiles("stdlib", root, files_below(root, left_out, suffix=".py"), split, "text", whole=True)


def files_below(root: Path, left_out: Callable[[str], bool], suffix: str = "") -> tuple[Path, ...]:
    """Find the files below a folder, sorted by relative path.

    Args:
        root: the folder.
        left_out: whether to skip a file, or a folder with all of its contents, given its name.
        suffix: what the names of the files must end in.

    Raises:
        DataError: there are no such files.
    """
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not left_out(name)]
        files.extend(Path(folder, name) for name in names if name.endswith(suffix) and not left_out(name))
    if not files:
        raise DataError(f"no data files in the folder {root}")
    return tuple(sorted(files, key=lambda path: path.relative_to(root).as_posix()))


def _utf8(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it, or give JSON Lines or parquet") from error


def _no_documents(name: str, split: Split) -> str:
    if split == "train":
        return f"{name!r} holds no text to train on"
    return (
        f"{name!r} holds no validation text: about one document in twenty is held out, chosen by hash, and none of "
        "these was; give more documents, or a folder with files train* and validation* as hf:FOLDER"
    )
