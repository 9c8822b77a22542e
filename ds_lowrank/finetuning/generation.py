"""Greedy answers to held-out prompts, and how many of them are right."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from transformers import GenerationConfig

from ds_lowrank.collectives import all_gather_object, global_rank
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.example_tokenizer import ExampleTokenizer
from ds_lowrank.data.examples import UNLABELLED, Example, HeldOut
from ds_lowrank.data.records import Row
from ds_lowrank.finetuning.answers import MATCHES, exact_match

logger = logging.getLogger("ds_lowrank")


@dataclass(frozen=True)
class Generation:
    """How answers are generated and compared.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        match: what is compared, a key of ``answers.MATCHES``.
    """

    max_new_tokens: int
    match: str


def check_answers(
    generation: Generation, rows: Sequence[Row], examples: Sequence[Example], answered_in: str, longest: int | None
) -> None:
    """Check that answers can be generated and compared.

    Args:
        generation: how answers are generated and compared.
        rows: the held-out rows.
        examples: the examples of these rows.
        answered_in: names the columns of the right answers in messages.
        longest: the most tokens that the model takes; None if it does not say.

    Raises:
        DataError: an example has no prompt, or too long a prompt, or in its answer there is nothing to compare.
    """
    for row, example in zip(rows, examples, strict=True):
        assert isinstance(example.labels, np.ndarray)
        prompt = int((example.labels != UNLABELLED).argmax())
        if not prompt:
            raise DataError(f"{row.where} has no prompt to generate an answer to; remove it")
        if longest is not None and prompt + generation.max_new_tokens > longest:
            raise DataError(
                f"{row.where}: its prompt of {prompt} tokens and --max-new-tokens {generation.max_new_tokens} are more "
                f"than the {longest} tokens that the model takes: lower --max-new-tokens, or remove the row"
            )
        if MATCHES[generation.match](example.answer) is None:
            raise DataError(
                f"{row.where}: --match {generation.match} finds nothing to compare in the answer "
                f"{reprlib.repr(example.answer)} of {answered_in}: correct it, or choose another --match "
                f"({', '.join(MATCHES)})"
            )


@torch.no_grad()
def right_answers(
    engine: DeepSpeedEngine,
    batches: Sequence[HeldOut],
    tokenizer: ExampleTokenizer,
    generation: Generation,
    ends: Collection[int] = (),
) -> float:
    """The fraction of the examples of all ranks that are answered right, greedily. Collective.

    Args:
        engine: the engine of a causal language model; it is left in training mode.
        batches: this rank's batches; all ranks must have the same number of them.
        tokenizer: the tokenizer of the examples.
        generation: how answers are generated and compared.
        ends: tokens that end an answer, besides the end of text and those that the model names.
    """
    right = answered = 0
    settings = _settings(engine.module, tokenizer, generation.max_new_tokens, ends)
    engine.eval()
    for (_, examples), answers in zip(batches, _answers(engine, batches, tokenizer, settings), strict=True):
        # A batch without examples only keeps the ranks in step.
        for example, answer in zip(examples, answers, strict=False):
            if answered == 0 and global_rank() == 0:
                logger.info("generated %s for %s", reprlib.repr(answer), reprlib.repr(example.answer))
            right += exact_match(generation.match, answer, example.answer)
            answered += 1
    engine.train()
    counts = all_gather_object((right, answered))
    return sum(part for part, _ in counts) / sum(part for _, part in counts)


def _answers(
    engine: DeepSpeedEngine, batches: Sequence[HeldOut], tokenizer: ExampleTokenizer, settings: Any
) -> Iterator[list[str]]:
    """The answers to the prompts of one batch after the other.

    Under ZeRO 3 each forward pass gathers weights, and so all ranks generate until the last of them has finished.
    """
    for batch, _ in batches:
        ids, mask = _left_padded(batch, tokenizer.pad_id)
        found = engine.module.generate(
            input_ids=ids.to(engine.device),
            attention_mask=mask.to(engine.device),
            generation_config=settings,
            synced_gpus=engine.zero_optimization_partition_weights(),
        )
        yield [_answer(row, settings.eos_token_id or (), tokenizer) for row in found[:, ids.shape[1] :].tolist()]


def _settings(model: Any, tokenizer: ExampleTokenizer, max_new_tokens: int, ends: Collection[int]) -> Any:
    """Greedy decoding. What is not named here is taken from the checkpoint, which may ask for samples or penalties."""
    of_model = model.generation_config.eos_token_id
    stop = {*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_id, *ends} - {None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=sorted(stop) or None,
    )


def _left_padded(batch: dict[str, torch.Tensor], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts of a batch: ids and attention mask, int64 ``[examples, longest prompt]``, padded on the left."""
    prompts = [
        ids[: int((labels != UNLABELLED).nonzero()[0])]
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    shape = len(prompts), max(map(len, prompts))
    padded = torch.full(shape, pad_id, dtype=torch.int64, device="cpu")
    mask = torch.zeros(shape, dtype=torch.int64, device="cpu")
    for row, prompt in enumerate(prompts):
        padded[row, shape[1] - len(prompt) :] = prompt
        mask[row, shape[1] - len(prompt) :] = 1
    return padded, mask


def _answer(ids: list[int], ends: Collection[int], tokenizer: ExampleTokenizer) -> str:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:stop], special=False)
