"""The text of a run: tokenized, packed into sequences, checked against the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.collectives import raise_on_all_ranks
from ds_lowrank.data.batches import BatchStream, Step
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.indexed import IndexedTokens
from ds_lowrank.data.packing import PackedBlocks, PackedStream, pack
from ds_lowrank.data.sources import Source, open_source
from ds_lowrank.data.tokenizer import TextTokenizer, check_vocabulary, load_tokenizer

Packed = PackedBlocks | PackedStream


@dataclass(frozen=True)
class Text:
    """`validation` is None where nothing is to be evaluated, `tokenizer` where the data are token ids already."""

    train: Packed
    validation: Packed | None
    tokenizer: TextTokenizer | None


@dataclass
class TextSteps:
    """A stream of sequences as what a causal LM takes; `tokens` are those of a step."""

    stream: BatchStream
    tokens: int

    def next_step(self) -> Step:
        return Step([{"input_ids": rows, "labels": rows} for rows in self.stream.next_step()], self.tokens)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
    """Open the splits of `data`, `held_out` or not, under the named tokenizer (None: bpe for text, none for token ids).

    Collective; an error is raised on every rank: DataError for data that cannot be used, and for a vocabulary that the
    model, with its `model_vocab` embeddings, does not have.
    """
    with raise_on_all_ranks():
        sources = {split: open_source(data, split) for split in (("train", "validation") if held_out else ("train",))}
    loaded = _load(sources["train"], tokenizer, vocab_size, cache)
    packed = {
        split: pack(source, loaded, sequence_length=sequence_length, cache_dir=cache)
        for split, source in sources.items()
    }
    with raise_on_all_ranks():
        for split in packed.values():
            check_vocabulary(split.vocab_size, model_vocab)
    return Text(packed["train"], packed.get("validation"), loaded)


def _load(source: Source, tokenizer: str | None, vocab_size: int, cache: Path) -> TextTokenizer | None:
    if isinstance(source, IndexedTokens):
        if tokenizer is None:
            return None
        if tokenizer == "bpe":
            raise DataError(f"{source.name!r} holds token ids, bpe is trained on text; name the tokenizer they have")
        return load_tokenizer(tokenizer, lambda: iter(()), cache_dir=cache)
    return load_tokenizer(tokenizer or "bpe", source.documents, vocab_size=vocab_size, cache_dir=cache)
