"""Where training text comes from: ``open_source`` turns a data spec into the documents of one split.

| spec | documents | held out for validation (see ``split``) |
|---|---|---|
| ``stdlib`` | the ``*.py`` files of this interpreter's standard library | by relative path |
| ``*.jsonl``, ``*.json``, ``*.parquet`` | the ``text`` field of every record | by (file name, record number) |
| a folder | record files as above; any other file is a document; sorted | by path (and record number) |
| any other file | one text, cut into blocks; adjacent blocks of the same split form a document | by the block's text |
| ``hf:NAME[:CONFIG]`` | streamed with ``datasets``, from the hub or a local folder | its own ``validation`` split |
| ``megatron:PREFIX`` | token ids of ``PREFIX.bin`` and ``PREFIX.idx`` | by document number |

Files may be compressed (``.gz``, ``.zst``). In a folder, names that start with a dot and files that are not text are
skipped. A block consists of whole lines. It ends at the first blank line after 4096 characters, or at the first line
end after 16384 characters. A document of a text file ends at the latest with the line in which it reaches 4 million
characters, so that no file is in memory as a whole.
"""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path

from ds_lowrank.data.errors import DataError, NotTextError
from ds_lowrank.data.files import content_hash, files_below, holds_records, is_hidden
from ds_lowrank.data.indexed import IndexedTokens
from ds_lowrank.data.records import read_texts
from ds_lowrank.data.split import Split, belongs, check_split, split_of
from ds_lowrank.data.stream import TextStream
from ds_lowrank.data.text import opened_text

logger = logging.getLogger("ds_lowrank")

BLOCK_CHARACTERS = 4096
LONGEST_BLOCK_CHARACTERS = 16384
LONGEST_DOCUMENT_CHARACTERS = 2**22


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
            for number, text in enumerate(read_texts(path, self.text_field)):
                if belongs(f"{key}\n{number}", self.split):
                    yield text
        elif not self.whole:
            with opened_text(path) as file:
                yield from text_blocks(_lines(file), self.split)
        elif belongs(key, self.split):
            yield from self._text_or_nothing(path)

    def _text_or_nothing(self, path: Path) -> Iterator[str]:
        begun = False
        try:
            with opened_text(path) as file:
                while text := file.read(LONGEST_DOCUMENT_CHARACTERS):
                    if len(text) == LONGEST_DOCUMENT_CHARACTERS:
                        text += file.readline(LONGEST_DOCUMENT_CHARACTERS)
                    begun = True
                    yield text
        except NotTextError as error:
            if begun:  # half of it would be trained on
                raise
            # The standard library's own tests contain such files on purpose, which is not worth a warning.
            level = logging.DEBUG if self.name == "stdlib" else logging.WARNING
            logger.log(level, "left out, %s", error)


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
        return TextStream.open(spec, "train" if split == "all" else split, text_field)
    if spec.startswith("megatron:"):
        return IndexedTokens.open(spec, split)
    if spec == "stdlib":
        return _standard_library(split)
    path = Path(spec).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise DataError(f"no data can be read at {spec!r} ({error.strerror})") from error
    if spec and is_folder:
        return TextFiles(spec, path, files_below(path, is_hidden), split, text_field, whole=True)
    if is_file:
        return TextFiles(spec, path.parent, (path,), split, text_field, whole=False)
    raise DataError(
        f"no data at {spec!r}: give an existing file or folder, 'stdlib', 'hf:NAME[:CONFIG]' or 'megatron:PREFIX'"
    )


def text_blocks(lines: Iterable[str], split: Split) -> Iterator[str]:
    """Iterate over the blocks of a text that belong to a split, adjacent ones joined.

    The blocks of both splits together are exactly the text.

    Args:
        lines: the text's lines, with their ends.
        split: the split; ``all`` for the documents of both.
    """
    for owner, blocks in groupby(_blocks(lines), key=split_of):
        if split in (owner, "all"):
            yield from _joined(blocks)


def _joined(blocks: Iterable[str]) -> Iterator[str]:
    """Join blocks to documents of bounded length."""
    parts: list[str] = []
    size = 0
    for block in blocks:
        parts.append(block)
        size += len(block)
        if size >= LONGEST_DOCUMENT_CHARACTERS:
            yield "".join(parts)
            parts, size = [], 0
    if parts:
        yield "".join(parts)


def _lines(file: TextIOWrapper) -> Iterator[str]:
    """Lines with their ends. A longer one than a document is cut."""
    while piece := file.readline(LONGEST_DOCUMENT_CHARACTERS):
        yield from piece.splitlines(keepends=True)


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= LONGEST_BLOCK_CHARACTERS or (size >= BLOCK_CHARACTERS and not line.strip()):
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def _standard_library(split: Split) -> TextFiles:
    root = Path(sysconfig.get_path("stdlib"))

    def left_out(name: str) -> bool:
        # _sysconfigdata_*.py records how this interpreter was built, which differs between builds of one version.
        return name in ("site-packages", "dist-packages") or name.startswith("_sysconfigdata")

    return TextFiles("stdlib", root, files_below(root, left_out, suffix=".py"), split, "text", whole=True)


def _no_documents(name: str, split: Split) -> str:
    if split != "validation":
        return f"{name!r} holds no text to train on: give files with text in them"
    return (
        f"{name!r} holds no validation text: about one document in twenty is held out, chosen by hash, and none of "
        "these was; give more documents, or a folder with files train* and validation* as hf:FOLDER"
    )
