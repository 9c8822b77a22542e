"""Tokenizers for pre-training: a BPE trained on the data, plain bytes, or a published tokenizer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_lowrank.collectives import broadcast_from_rank0, first_on_node
from ds_lowrank.data.cache import ensure_built
from ds_lowrank.data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
BYTE_VOCABULARY = 257  # all bytes, and the end of text
TRAINING_CHARACTERS = 64_000_000


class TextTokenizer:
    """A Hugging Face fast tokenizer for plain documents.

    No special tokens are added, and text that looks like one (``<|endoftext|>``) is encoded as ordinary text.

    Args:
        tokenizer: Hugging Face's tokenizer.
        name: names it in error messages.

    Attributes:
        tokenizer: Hugging Face's tokenizer.
        eos_id: the id that separates documents.
        vocab_size: one more than the largest id.
        fingerprint: hash of everything that the encoding depends on.

    Raises:
        DataError: the tokenizer is not a fast one, or has no end-of-text token.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"tokenizer {name!r} has no fast version (tokenizer.json); convert it or use another")
        if tokenizer.eos_token_id is None:
            raise DataError(f"tokenizer {name!r} has no eos_token, which separates documents; set one in its config")
        self.tokenizer = tokenizer
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.eos_id: int = tokenizer.eos_token_id
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(f"{self.eos_id} {self._backend.to_str()}".encode()).hexdigest()

    def encode_documents(self, documents: Sequence[str]) -> list[list[int]]:
        """Encode each document to token ids, without an end-of-text token."""
        encodings = self._backend.encode_batch_fast(list(documents), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode token ids to text, including special tokens."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=False)
        return text

    def save(self, directory: Path) -> None:
        """Write the tokenizer to a folder that ``AutoTokenizer.from_pretrained`` can read."""
        self.tokenizer.save_pretrained(str(directory))


def load_tokenizer(
    spec: str,
    documents: Callable[[], Iterator[str]],
    *,
    vocab_size: int = 4096,
    cache_dir: Path,
    training_characters: int = TRAINING_CHARACTERS,
) -> TextTokenizer:
    """Make or load a tokenizer, the same one on every rank. Collective; if one rank fails, all raise.

    Args:
        spec: ``bpe``, a byte-level BPE that rank 0 trains unless it is cached; ``bytes``, whose ids are the 256 byte
            values and one end of text; or a folder or hub name for ``AutoTokenizer``. Only ``bpe`` uses the other
            arguments.
        documents: starts an iteration over the training documents.
        vocab_size: the most entries of the vocabulary, at least 257.
        cache_dir: the folder of the cache.
        training_characters: how much text to train on, taken from the start of ``documents()``.

    Raises:
        DataError: the vocabulary is too small for all bytes, or the tokenizer cannot be loaded or used.
    """
    if spec == "bpe":
        if vocab_size < BYTE_VOCABULARY:
            raise DataError(f"vocab_size {vocab_size} cannot hold every byte and the end of text: use 257 or more")
        trained = broadcast_from_rank0(lambda: _trained_bpe(documents(), vocab_size, training_characters, cache_dir))
        return _wrapped(tokenizers.Tokenizer.from_str(trained), spec)
    if spec == "bytes":
        return _wrapped(_byte_tokenizer(), spec)
    return first_on_node(lambda: _published(spec))


def _wrapped(tokenizer: tokenizers.Tokenizer, name: str) -> TextTokenizer:
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT), name)


def _published(spec: str) -> TextTokenizer:
    name = os.path.expanduser(spec)
    if name.startswith((".", "/")) and not os.path.isdir(name):
        raise DataError(f"no tokenizer folder {spec!r}: use 'bpe', 'bytes', or a folder or hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        raise DataError(
            f"tokenizer {spec!r} cannot be loaded ({' '.join(str(error).split())}); use 'bpe', 'bytes', or a folder or "
            "hub name"
        ) from error
    check_vocabulary(tokenizer, spec)
    return TextTokenizer(tokenizer, spec)


def check_vocabulary(tokenizer: Any, spec: str) -> None:
    """Refuse the empty tokenizer that transformers 5 makes of a model's folder without tokenizer files.

    Args:
        tokenizer: Hugging Face's tokenizer.
        spec: where it was loaded from, for the message.

    Raises:
        DataError: it has special tokens only, so that every text would be empty.
    """
    if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) < 2:
        raise DataError(
            f"no tokenizer in {spec!r} (its vocabulary is empty); put the checkpoint's own files there, or name it as "
            "--tokenizer"
        )


def _trained_bpe(documents: Iterator[str], vocab_size: int, characters: int, cache_dir: Path) -> str:
    sample = _first_characters(documents, characters)
    key = hashlib.sha256(f"byte-level BPE, {vocab_size} tokens, tokenizers {tokenizers.__version__}".encode())
    for document in sample:
        encoded = document.encode("utf-8")
        key.update(f"\n{len(encoded)}\n".encode())
        key.update(encoded)
    path = cache_dir / f"bpe-{key.hexdigest()}.json"
    ensure_built(path, lambda aside: _train_bpe(sample, vocab_size, aside))
    return path.read_text(encoding="utf-8")


def _first_characters(documents: Iterator[str], characters: int) -> list[str]:
    """The first documents, as many as are needed to have ``characters`` characters."""
    sample: list[str] = []
    size = 0
    for document in documents:
        sample.append(document)
        size += len(document)
        if size >= characters:
            break
    return sample


def _train_bpe(sample: list[str], vocab_size: int, path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    path.write_text(tokenizer.to_str(), encoding="utf-8")


def _byte_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE without merges, in which the id of a byte is its value."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that represents each byte value in the byte-level format.

    Bytes that are printable in Latin-1 represent themselves; the others use the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]
