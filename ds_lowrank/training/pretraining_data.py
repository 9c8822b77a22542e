"""The data of a pre-training run: tokenized, packed into sequences, and checked against the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.collectives import raise_on_all_ranks
from ds_lowrank.data.batches import BatchStream, Step
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.indexed import IndexedTokens
from ds_lowrank.data.packing import PackedBlocks, PackedStream, pack
from ds_lowrank.data.sources import Source, open_source
from ds_lowrank.data.tokenizer import TextTokenizer, load_tokenizer

Packed = PackedBlocks | PackedStream


@dataclass(frozen=True)
class Text:
    """The opened data of a run.

    Attributes:
        train: the packed training data.
        validation: the packed validation data; None if nothing is evaluated.
        tokenizer: the tokenizer; None for token ids without one.
    """

    train: Packed
    validation: Packed | None
    tokenizer: TextTokenizer | None


@dataclass
class TextSteps:
    """A stream of sequences as keyword arguments of a causal language model.

    Attributes:
        stream: the sequences.
        tokens: tokens per optimizer step on all ranks together.
    """

    stream: BatchStream
    tokens: int

    def next_step(self) -> Step:
        """This rank's micro-batches of the next optimizer step."""
        return Step([{"input_ids": rows, "labels": rows} for rows in self.stream.next_step()], self.tokens)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data; see ``BatchStream.state_dict``."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; see ``BatchStream.load_state_dict``."""
        self.stream.load_state_dict(state)


def open_text(
    data: str,
    tokenizer: str | None,
    *,
    vocab_size: int,
    model_vocab: int,
    sequence_length: int,
    held_out: bool,
    cache: Path,
) -> Text:
    """Open, tokenize and pack the data of a run. Collective; if one rank fails, all raise.

    Args:
        data: the data spec; see ``data/sources.py``.
        tokenizer: the tokenizer spec; see ``load_tokenizer``. None for ``bpe`` with text and no tokenizer with token
            ids.
        vocab_size: the most entries of a ``bpe`` tokenizer.
        model_vocab: the number of the model's embeddings.
        sequence_length: tokens per sequence.
        held_out: whether to hold the validation split out and open it too; otherwise all documents are for training,
            except for ``hf:``, whose splits are the data set's own.
        cache: the folder for tokenizers and tokenized text.

    Raises:
        DataError: the data cannot be used, or contain token ids for which the model has no embedding.
        ValueError: the nodes of the job have different data.
    """
    with raise_on_all_ranks():
        train = open_source(data, "train" if held_out else "all")
        validation = open_source(data, "validation") if held_out else None
    loaded = _load(train, tokenizer, vocab_size, cache)

    def packed(source: Source) -> Packed:
        return pack(source, loaded, sequence_length=sequence_length, cache_dir=cache, model_vocab=model_vocab)

    return Text(packed(train), None if validation is None else packed(validation), loaded)


def _load(source: Source, tokenizer: str | None, vocab_size: int, cache: Path) -> TextTokenizer | None:
    if isinstance(source, IndexedTokens):
        if tokenizer is None:
            return None
        if tokenizer == "bpe":
            raise DataError(
                f"{source.name!r} contains token ids, but bpe is trained on text; name the tokenizer of the data"
            )
        return load_tokenizer(tokenizer, lambda: iter(()), cache_dir=cache)
    spec = "bpe" if tokenizer is None else tokenizer
    return load_tokenizer(spec, source.documents, vocab_size=vocab_size, cache_dir=cache)
