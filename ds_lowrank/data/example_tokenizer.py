"""A checkpoint's own tokenizer, for examples of one or two texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from ds_lowrank.collectives import first_on_node
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.tokenizer import check_vocabulary, load_tokenizer

SEPARATOR = "\n"  # between the two texts of a pair, if the tokenizer has no special tokens for pairs


class ExampleTokenizer:
    """A Hugging Face tokenizer that adds its own special tokens, for fine-tuning examples.

    Args:
        tokenizer: Hugging Face's tokenizer.
        name: names it in error messages.

    Attributes:
        pad_id: the id that pads short examples; the end-of-text id if there is no padding token.
        eos_id: the end-of-text id, or None if the tokenizer has none.
        special_ids: the ids of all special tokens.
        max_length: the most tokens that the tokenizer is made for, or None if it does not say.

    Raises:
        DataError: the tokenizer has neither a padding nor an end-of-text token.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise DataError(f"tokenizer {name!r} has neither pad_token nor eos_token; set one in its config")
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer = tokenizer
        self._name = name
        self._joins = tokenizer.num_special_tokens_to_add(pair=True) == 0
        self.pad_id: int = tokenizer.pad_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.special_ids = frozenset(tokenizer.all_special_ids)
        longest = tokenizer.model_max_length
        self.max_length: int | None = longest if longest < 10**9 else None  # a huge number means "not given"

    def encode(self, columns: Sequence[Sequence[str]], max_length: int, segments: bool) -> list[dict[str, Any]]:
        """Encode examples of one or two texts with special tokens, truncated to ``max_length``.

        Args:
            columns: one or two columns of texts, all of the same length. The longer text of a pair is truncated first.
            max_length: the most tokens of an example.
            segments: whether to return token types, which tell the two texts of a pair apart.

        Returns:
            For each example ``input_ids`` and, with ``segments``, ``token_type_ids``: int32 ``[length]`` arrays.
        """
        if len(columns) == 2 and self._joins:
            columns = [[SEPARATOR.join(pair) for pair in zip(*columns, strict=True)]]
        encoded = self._tokenizer(
            *map(list, columns),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=segments,
        )
        return [
            {key: np.asarray(encoded[key][row], dtype=np.int32) for key in encoded} for row in range(len(columns[0]))
        ]

    def opening(self) -> list[int]:
        """The ids that the tokenizer puts before every text, such as a beginning-of-sequence token."""
        ids: list[int] = self._tokenizer("").input_ids
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def plain(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Encode texts without special tokens or truncation: one int32 ``[length]`` array per text."""
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def chat(self, prompt: str, completion: str) -> tuple[str, str]:
        """Put a prompt and its completion into the tokenizer's chat template, as a user's and an assistant's message.

        Returns:
            What is read before the answer, and the answer with what ends it. Special tokens are spelled out in both.

        Raises:
            DataError: there is no chat template, or what it makes of both does not begin with what it makes of the
                prompt alone.
        """
        if self._tokenizer.chat_template is None:
            raise DataError(f"--chat: tokenizer {self._name!r} has no chat template; use --template")
        question = [{"role": "user", "content": prompt}]
        answered = [*question, {"role": "assistant", "content": completion}]
        try:
            before: str = self._tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            whole: str = self._tokenizer.apply_chat_template(answered, tokenize=False)
        except Exception as error:  # a template is a program that may raise anything
            raise DataError(f"--chat: the chat template of {self._name!r} fails ({error}); use --template") from error
        if not whole.startswith(before):
            raise DataError(
                f"--chat: the chat template of tokenizer {self._name!r} does not put an answer after its opening of "
                "one, so that a model would not learn what it is asked for; use --template"
            )
        return before, whole[len(before) :]

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        """Decode token ids to text.

        Args:
            ids: the ids.
            special: whether special tokens are spelled out, or else left out.
        """
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def save(self, directory: Path) -> None:
        """Write the tokenizer to a folder that ``AutoTokenizer.from_pretrained`` can read."""
        self._tokenizer.save_pretrained(str(directory))


def load_example_tokenizer(spec: str, texts: Iterator[str], vocab_size: int, cache: Path) -> ExampleTokenizer:
    """Load a checkpoint's tokenizer, or make a simple one. Collective; if one rank fails, all raise.

    Args:
        spec: a checkpoint folder or hub name; or ``bpe``, trained on ``texts``; or ``bytes``.
        texts: the training texts for ``bpe``.
        vocab_size: the most entries of a ``bpe`` tokenizer.
        cache: the folder where a trained ``bpe`` tokenizer is cached.

    Raises:
        DataError: there is no such tokenizer, or it cannot be used.
    """
    if spec in ("bpe", "bytes"):
        made = load_tokenizer(spec, lambda: texts, vocab_size=vocab_size, cache_dir=cache)
        return ExampleTokenizer(made.tokenizer, spec)
    return first_on_node(lambda: ExampleTokenizer(_published(spec), spec))


def _published(spec: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(spec), trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        raise DataError(
            f"no tokenizer in {spec!r} ({' '.join(str(error).split())}); put the checkpoint's own files there, or name "
            "it as --tokenizer"
        ) from error
    check_vocabulary(tokenizer, spec)
    return tokenizer
