"""Text streamed with Hugging Face ``datasets`` from the hub or a local folder, without downloading all of it first."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.files import files_below, is_hidden
from ds_lowrank.data.records import record_text
from ds_lowrank.data.split import Split
from ds_lowrank.data.text import marked_encoding

TEXT_FORMATS = (".csv", ".json", ".jsonl", ".tsv", ".txt")


@dataclass(frozen=True)
class TextStream:
    """One split of a streamed data set, read in the data set's own order in every epoch.

    Attributes:
        name: the data spec, for messages.
        builder: the ``datasets.DatasetBuilder``.
        split: the split to read.
        text_field: the field of a record that contains the text.
    """

    name: str
    builder: Any
    split: Split
    text_field: str

    @classmethod
    def open(cls, spec: str, split: Split, text_field: str) -> TextStream:
        """Open ``hf:NAME[:CONFIG]``, where ``NAME`` is a hub data set or a local folder.

        Raises:
            DataError: the data set cannot be found or reached, or it does not have the split.
        """
        name, config = name_and_config(spec)
        builder = _load_builder(spec, name, config)
        if split not in builder.config.data_files:
            found = ", ".join(map(str, builder.config.data_files))
            raise DataError(f"{spec!r} has no {split!r} split (it has: {found}); add files named {split}*")
        return cls(spec, builder, split, text_field)

    def documents(self) -> Iterator[str]:
        """Iterate over the non-empty documents of one epoch, from its start.

        Raises:
            DataError: a record cannot be read or has no usable text.
        """
        reader = StreamReader(self)
        while documents := reader.read(1):
            yield from documents

    def fingerprint(self) -> str:
        """Hash of the data set's name, its files' names (for local files also their sizes), split and text field.

        It does not cover the text itself, as a stream is too long to be read in advance.
        """
        files = [_file_identity(str(file)) for file in self.builder.config.data_files[self.split]]
        name = os.path.basename(self.name)
        return hashlib.sha256("\n".join([name, *files, self.split, self.text_field]).encode()).hexdigest()


class StreamReader:
    """A position in one epoch of a stream.

    Args:
        stream: the stream to read.
        state: the position to continue from, as returned by ``state_dict``; None for the start of the epoch.
    """

    def __init__(self, stream: TextStream, state: dict[str, Any] | None = None) -> None:
        self._stream = stream
        self._dataset = stream.builder.as_streaming_dataset(split=stream.split)
        if state is not None:
            self._dataset.load_state_dict(state)
        self._read = 0 if state is None else None  # records; their number is not in the state
        # Until the first record is read, ``datasets`` reports the start of the data, not the state it was given.
        self._state_before_reading = state
        self._records = iter(self._dataset)

    def read(self, count: int) -> list[str]:
        """Read up to ``count`` non-empty documents: fewer at the end of the epoch, and an empty list after it.

        Raises:
            DataError: a record cannot be read or has no usable text.
        """
        documents: list[str] = []
        while len(documents) < count:
            record = self._next_record()
            if record is None:
                break
            # A mark at the start of a text file, which ``datasets`` does not remove.
            if text := record_text(record, self._stream.text_field, self._where()).removeprefix("\ufeff"):
                documents.append(text)
        return documents

    def state_dict(self) -> dict[str, Any]:
        """The position after the last document that was read: nested dicts of numbers and strings."""
        if self._state_before_reading is not None:
            return self._state_before_reading
        state: dict[str, Any] = self._dataset.state_dict()
        return state

    def _next_record(self) -> dict[str, Any] | None:
        self._state_before_reading = None
        try:
            record: dict[str, Any] | None = next(self._records, None)
        except Exception as error:  # its own classes, or those of its readers and of the hub's client
            raise DataError(
                f"{self._where()}: cannot be read any further, it may be damaged or unreachable ({cause(error)})"
            ) from error
        if self._read is not None:
            self._read += 1
        return record

    def _where(self) -> str:
        place = f"{self._stream.name!r}, {self._stream.split} split"
        return place if self._read is None else f"{place}, record {max(0, self._read - 1)}"


def name_and_config(spec: str) -> tuple[str, str | None]:
    """The folder or hub name, and the configuration if there is one, in ``hf:NAME[:CONFIG]``.

    Raises:
        DataError: there is no name, or no such folder; or a file in it cannot be read as text, or a part of it not at
            all, which ``datasets`` would leave out without a word.
    """
    name, _, config = spec.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(f"{spec!r} names no data set: give hf:NAME, or a folder as hf:./FOLDER")
    if name.startswith((".", "/", "~")):
        name = os.path.expanduser(name)
        if not os.path.isdir(name):
            raise DataError(f"{spec!r}: no folder {name}")
        for path in files_below(Path(name), is_hidden):
            _check_encoding(path)
    return name, config or None


def _check_encoding(path: Path) -> None:
    encoding = marked_encoding(path) if path.suffix.lower() in TEXT_FORMATS else "utf-8"
    if not encoding.startswith("utf-8"):
        raise DataError(f"{path}: {encoding.upper()} text, which datasets cannot read: convert it to UTF-8")


def cause(error: BaseException) -> str:
    """An error and those that it was raised from, in one line: ``datasets`` wraps those of its readers.

    Args:
        error: the error.
    """
    chain = [error]
    while (inner := chain[-1].__cause__) is not None:
        chain.append(inner)
    return "; ".join(dict.fromkeys(" ".join(f"{type(one).__name__}: {one}".split()) for one in chain))


def _load_builder(spec: str, name: str, config: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(name, config)
    except (ConnectionError, TimeoutError) as error:
        raise DataError(
            f"{spec!r}: the Hugging Face hub cannot be reached ({error}); check the network and HF_HUB_OFFLINE, "
            "or give a local folder as hf:./FOLDER"
        ) from error
    except Exception as error:  # its own classes, or those of the hub's client and of its readers
        raise DataError(f"{spec!r} cannot be opened as a data set: {cause(error)}") from error


def _file_identity(file: str) -> str:
    path = Path(file)
    if path.is_file():
        return f"{path.name} {path.stat().st_size}"
    # hf://datasets/NAME@REVISION/PATH: a new revision that keeps the files (a README edit) must not stop a resume.
    head, at, tail = file.partition("@")
    return head + tail.partition("/")[2] if at else file
