"""Documents joined end to end, an end-of-text token between them, and cut into sequences: nothing is padded."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ds_lowrank.collectives import once_per_node
from ds_lowrank.data.cache import ensure_built_on_nodes
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.indexed import IndexedTokens
from ds_lowrank.data.sources import Source, TextFiles
from ds_lowrank.data.stream import TextStream
from ds_lowrank.data.tokenizer import TextTokenizer

Tokens = npt.NDArray[np.integer[Any]]

DOCUMENTS_PER_BATCH = 256


@dataclass(frozen=True)
class PackedBlocks:
    """Finite data: `len(self)` sequences of `sequence_length` tokens; the few tokens left at the end are dropped.

    name: the data spec, for messages.
    tokens: 1-D, unsigned integers, memory-mapped.
    vocab_size: one more than the largest id the tokenizer has (without a tokenizer: that the data hold).
    fingerprint: hash of the data and the tokenizer.
    """

    name: str
    tokens: Tokens
    sequence_length: int
    vocab_size: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def rows(self, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        """Sequences by number: int64 `[len(indices), sequence_length]`."""
        blocks = self.tokens[: len(self) * self.sequence_length].reshape(len(self), self.sequence_length)
        return torch.from_numpy(blocks[indices].astype(np.int64))


@dataclass(frozen=True)
class PackedStream:
    """Streamed data: packed while they are read (see `batches`). Fields as in `PackedBlocks`."""

    name: str
    stream: TextStream
    tokenizer: TextTokenizer
    sequence_length: int
    vocab_size: int
    fingerprint: str


def pack(
    source: Source, tokenizer: TextTokenizer | None, *, sequence_length: int, cache_dir: Path
) -> PackedBlocks | PackedStream:
    """The source's split as sequences of `sequence_length` tokens.

    Finite sources are tokenised once and kept in `cache_dir`, under the hash of the data and the tokenizer. Token ids
    (`megatron:`) need no tokenizer; with one, each document that does not end in its end-of-text token gets one.

    Collective over all ranks; an error is raised on every rank: DataError for unusable data, for text without a
    tokenizer and for token ids that the tokenizer does not have; ValueError if the nodes of a job hold different data.
    """
    if sequence_length < 2:
        raise DataError(f"sequence_length {sequence_length}: use 2 or more, the model predicts each next token")
    if tokenizer is None and not isinstance(source, IndexedTokens):
        raise DataError(f"{source.name!r} is text: give a tokenizer")
    data = once_per_node(source.fingerprint, f"the data of {source.name!r}")
    fingerprint = hashlib.sha256(f"{data} {tokenizer.fingerprint if tokenizer else 'ids'}".encode()).hexdigest()
    if isinstance(source, TextStream):
        assert tokenizer is not None
        return PackedStream(source.name, source, tokenizer, sequence_length, tokenizer.vocab_size, fingerprint)

    path = cache_dir / f"tokens-{fingerprint}.npy"
    ensure_built_on_nodes(path, lambda aside: _write_tokens(aside, source, tokenizer))
    tokens: Tokens = np.load(path, mmap_mode="r")
    vocab_size = (
        tokenizer.vocab_size if tokenizer else once_per_node(lambda: int(tokens.max()) + 1, "the largest token id")
    )
    return PackedBlocks(source.name, tokens, sequence_length, vocab_size, fingerprint)


def batched_documents(documents: Iterator[str]) -> Iterator[list[str]]:
    """Lists of documents, as many as are worth encoding at once."""
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
        yield batch


def encoded(documents: list[str], tokenizer: TextTokenizer) -> Iterator[Tokens]:
    """Each document's token ids, the end-of-text token last."""
    for ids in tokenizer.encode_documents(documents):
        yield np.array([*ids, tokenizer.eos_id], dtype=np.int64)


def _write_tokens(path: Path, source: TextFiles | IndexedTokens, tokenizer: TextTokenizer | None) -> None:
    """Write a `.npy` of one dimension whose length is known only at its end."""
    narrow = tokenizer is not None and tokenizer.vocab_size <= 2**16
    dtype = np.dtype(np.uint16 if narrow else np.uint32)
    total = 0
    with open(path, "wb") as file:
        start = _write_header(file, dtype, total)
        for tokens in _token_documents(source, tokenizer):
            file.write(tokens.astype(dtype).tobytes())
            total += len(tokens)
        file.seek(0)
        # NumPy leaves room in a header for a longer length.
        if _write_header(file, dtype, total) != start:
            raise RuntimeError("the .npy header changed its size")


def _write_header(file: Any, dtype: np.dtype[Any], length: int) -> int:
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, description)
    return int(file.tell())


def _token_documents(source: TextFiles | IndexedTokens, tokenizer: TextTokenizer | None) -> Iterator[Tokens]:
    if isinstance(source, IndexedTokens):
        for tokens in source.documents():
            yield _checked(tokens, source.name, tokenizer)
    else:
        assert tokenizer is not None
        for documents in batched_documents(source.documents()):
            yield from encoded(documents, tokenizer)


def _checked(tokens: Tokens, name: str, tokenizer: TextTokenizer | None) -> Tokens:
    limit = tokenizer.vocab_size if tokenizer else 2**31
    if tokens.min() < 0 or tokens.max() >= limit:
        raise DataError(
            f"{name!r} holds token ids from {tokens.min()} to {tokens.max()}, outside 0 to {limit - 1}: "
            "give the tokenizer that the data were built with"
        )
    if tokenizer is not None and tokens[-1] != tokenizer.eos_id:
        return np.append(tokens.astype(np.int64), tokenizer.eos_id)
    return tokens
