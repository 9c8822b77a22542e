"""Comparing the token ids of the data with the embeddings of the model."""

from __future__ import annotations

from collections.abc import Callable

from ds_lowrank.data.errors import DataError


def check_id(token: int, model_vocab: int | None, where: str, decode: Callable[[list[int]], str] | None = None) -> None:
    """Check that the model has an embedding for a token that occurs in the data.

    Args:
        token: the token's id, the largest of the data.
        model_vocab: the number of embeddings; None for no model.
        where: names the data in the error message.
        decode: turns ids into text; None if there is no tokenizer.

    Raises:
        DataError: there is none. A tokenizer may have more tokens than the model if the data do not use them.
    """
    if model_vocab is None or token < model_vocab:
        return
    named = "" if decode is None else f" ({decode([token])!r})"
    padded = -(-(token + 1) // 128) * 128
    raise DataError(
        f"{where} uses token id {token}{named}, but the model's vocab_size is {model_vocab}: use the tokenizer that "
        f"the model was trained with, or for a new model set vocab_size to at least {token + 1} in its config "
        f"(a multiple of 128 is fastest: {padded})"
    )
