"""Packing: documents joined end to end with end-of-text tokens and cut into sequences, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
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
from ds_lowrank.data.vocabulary import check_id

Tokens = npt.NDArray[np.integer[Any]]

DOCUMENTS_PER_BATCH = 256
CHARACTERS_PER_BATCH = 2**22
TOKENS_PER_READ = 2**24


@dataclass(frozen=True)
class PackedBlocks:
    """Finite data as ``len(self)`` sequences of ``sequence_length`` tokens. Tokens left over at the end are dropped.

    Attributes:
        name: the data spec, for messages.
        tokens: all token ids, a 1-D memory-mapped array of unsigned integers.
        sequence_length: tokens per sequence.
        largest_id: the largest of the ids.
        fingerprint: hash of the data and the tokenizer.
    """

    name: str
    tokens: Tokens
    sequence_length: int
    largest_id: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence_length

    def rows(self, indices: npt.NDArray[np.int64]) -> torch.Tensor:
        """The sequences with these numbers, int64 ``[len(indices), sequence_length]``."""
        blocks = self.tokens[: len(self) * self.sequence_length].reshape(len(self), self.sequence_length)
        return torch.from_numpy(blocks[indices].astype(np.int64))


@dataclass(frozen=True)
class PackedStream:
    """Streamed data, packed while they are read (see ``batches.py``).

    Attributes:
        name: the data spec, for messages.
        stream: the documents.
        tokenizer: encodes them.
        sequence_length: tokens per sequence.
        model_vocab: the number of the model's embeddings; None for no model.
        fingerprint: hash of the data and the tokenizer.
    """

    name: str
    stream: TextStream
    tokenizer: TextTokenizer
    sequence_length: int
    model_vocab: int | None
    fingerprint: str

    def encoded(self, documents: list[str]) -> npt.NDArray[np.int64]:
        """Encode and join documents: int64 token ids, 1-D.

        Raises:
            DataError: the model has no embedding for an id.
        """
        tokens = np.concatenate([np.zeros(0, dtype=np.int64), *encoded(documents, self.tokenizer)])
        if len(tokens):
            check_id(int(tokens.max()), self.model_vocab, repr(self.name), self.tokenizer.decode)
        return tokens


def pack(
    source: Source,
    tokenizer: TextTokenizer | None,
    *,
    sequence_length: int,
    cache_dir: Path,
    model_vocab: int | None = None,
) -> PackedBlocks | PackedStream:
    """Turn one split of a source into sequences of tokens. Collective; if one rank fails, all raise.

    Finite sources are tokenised once and cached under the hash of the data and the tokenizer.

    Args:
        source: the documents.
        tokenizer: encodes text. Token ids (``megatron:``) need none; with one, its end-of-text token is appended to
            every document that does not end in it.
        sequence_length: tokens per sequence, at least 2.
        cache_dir: the folder of the cache.
        model_vocab: the number of the model's embeddings; None for no model.

    Raises:
        DataError: the data cannot be used, text comes without a tokenizer, token ids are outside the tokenizer's
            vocabulary or have no embedding in the model, or the sequence length is too small. Streams are only compared
            with the model while they are read.
        ValueError: the nodes of the job have different data.
    """
    if sequence_length < 2:
        raise DataError(f"sequence_length {sequence_length}: use 2 or more, the model predicts each next token")
    if tokenizer is None and not isinstance(source, IndexedTokens):
        raise DataError(f"{source.name!r} is text: give a tokenizer")
    data = once_per_node(source.fingerprint, f"the data of {source.name!r}")
    fingerprint = hashlib.sha256(f"{data} {tokenizer.fingerprint if tokenizer else 'ids'}".encode()).hexdigest()
    if isinstance(source, TextStream):
        assert tokenizer is not None
        return PackedStream(source.name, source, tokenizer, sequence_length, model_vocab, fingerprint)

    path = cache_dir / f"tokens-{fingerprint}.npy"
    ensure_built_on_nodes(path, lambda aside: _write_tokens(aside, source, tokenizer))
    tokens: Tokens = np.load(path, mmap_mode="r")
    largest = once_per_node(lambda: _largest(tokens), "the largest token id")
    check_id(largest, model_vocab, repr(source.name), None if tokenizer is None else tokenizer.decode)
    return PackedBlocks(source.name, tokens, sequence_length, largest, fingerprint)


def _largest(tokens: Tokens) -> int:
    return max(int(tokens[i : i + TOKENS_PER_READ].max()) for i in range(0, len(tokens), TOKENS_PER_READ))


def batched_documents(documents: Iterator[str]) -> Iterator[list[str]]:
    """Group documents into lists that are encoded at once: so many, or fewer long ones."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == DOCUMENTS_PER_BATCH or size >= CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(documents: list[str], tokenizer: TextTokenizer) -> Iterator[Tokens]:
    """Encode each document to int64 token ids that end with the end-of-text token."""
    for ids in tokenizer.encode_documents(documents):
        yield np.array([*ids, tokenizer.eos_id], dtype=np.int64)


def _write_tokens(path: Path, source: TextFiles | IndexedTokens, tokenizer: TextTokenizer | None) -> None:
    """Write a 1-D ``.npy`` file whose length is only known once all tokens are written."""
    narrow = tokenizer is not None and tokenizer.vocab_size <= 2**16
    dtype = np.dtype(np.uint16 if narrow else np.uint32)
    total = 0
    with open(path, "wb") as file:
        start = _write_header(file, dtype, total)
        for tokens in _token_documents(source, tokenizer):
            file.write(tokens.astype(dtype).tobytes())
            total += len(tokens)
        file.seek(0)
        # NumPy pads the header, so that a larger length fits in the same space.
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
