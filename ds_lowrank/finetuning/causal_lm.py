"""Fine-tuning a causal language model: on whole texts, or on completions after their prompts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from deepspeed import DeepSpeedEngine

from ds_lowrank.collectives import global_rank
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.example_tokenizer import ExampleTokenizer
from ds_lowrank.data.examples import UNLABELLED, Example, HeldOut
from ds_lowrank.data.records import Row
from ds_lowrank.finetuning.evaluation import summed_loss
from ds_lowrank.finetuning.generation import Generation, right_answers
from ds_lowrank.finetuning.templates import Template

logger = logging.getLogger("ds_lowrank")
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class CausalLM:
    """Predicting the next token of a text, or of a completion after its prompt.

    Attributes:
        template: makes prompts and completions of rows.
        chat: whether they are put into the tokenizer's chat template.
        generation: how answers are generated at evaluations; None for none.
    """

    template: Template
    chat: bool = False
    generation: Generation | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Exact match if answers are generated, and perplexity."""
        return ("perplexity",) if self.generation is None else ("exact_match", "perplexity")

    def texts(self, rows: Sequence[Row]) -> Iterator[str]:
        """Iterate over all texts of the rows."""
        both = ((self.template.prompt_of(row), self.template.completion_of(row)) for row in rows)
        return (text for pair in both for text in pair if text)

    def encode(
        self, rows: Sequence[Row], tokenizer: ExampleTokenizer, max_length: int, segments: bool
    ) -> list[Example]:
        """Encode rows as examples with labelled tokens; see :meth:`Task.encode`.

        Completions are truncated at their end. Prompts are truncated at their beginning, but not those of a template.
        """
        pairs = [(self.template.prompt_of(row), self.template.completion_of(row)) for row in rows]
        shown = [tokenizer.chat(*pair) for pair in pairs] if self.chat else pairs
        opening, closing = _ids([] if self.chat else tokenizer.opening()), _ids(_end(tokenizer))
        prompts = [np.concatenate([opening, ids]) for ids in tokenizer.plain([prompt for prompt, _ in shown])]
        completions = tokenizer.plain([completion for _, completion in shown])
        if not self._ends(tokenizer):
            completions = [np.concatenate([ids, closing]) for ids in completions]
        whole = self.chat or self.template.spec is not None
        if whole:
            _check_room(rows, prompts, max_length)
        examples = []
        for row, (_, answer), prompt, completion in zip(rows, pairs, prompts, completions, strict=True):
            if not whole:
                prompt, completion = _cut(prompt, completion, len(opening), max_length)
            completion = completion[: max_length - len(prompt)]
            unlabelled = np.full(len(prompt), UNLABELLED, dtype=np.int32)
            labels = np.concatenate([unlabelled, completion])
            example = Example(np.concatenate([prompt, completion]), labels, answer=answer)
            if not example.targets:
                raise DataError(f"{row.where} has nothing to predict in {self.template.answered_in}; remove it")
            examples.append(example)
        self._report_cut(examples, prompts, completions)
        return examples

    def measure(
        self, engine: DeepSpeedEngine, batches: Sequence[HeldOut], tokenizer: ExampleTokenizer
    ) -> dict[str, float]:
        """The loss per labelled token, in nats, the perplexity, and exact match; see :meth:`Task.measure`."""
        loss = summed_loss(engine, batches)
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # above that, a float overflows
        if self.generation is not None:
            found["exact_match"] = right_answers(engine, batches, tokenizer, self.generation, self._ends(tokenizer))
        return found

    def _ends(self, tokenizer: ExampleTokenizer) -> frozenset[int]:
        """The special tokens with which the chat template ends an answer."""
        if not self.chat:
            return frozenset()
        (ids,) = tokenizer.plain([tokenizer.chat("?", "!")[1]])
        return tokenizer.special_ids & frozenset(ids.tolist())

    def _report_cut(self, examples: Sequence[Example], prompts: Sequence[Ids], completions: Sequence[Ids]) -> None:
        if not self.template.prompts or global_rank() != 0:
            return
        whole = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        cut = sum(len(example.input_ids) < length for example, length in zip(examples, whole, strict=True))
        if cut:
            logger.info(
                "%d of %d examples are cut at --max-length; the longest has %d tokens", cut, len(examples), max(whole)
            )


def _end(tokenizer: ExampleTokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def _ids(found: Sequence[int]) -> Ids:
    return np.asarray(found, dtype=np.int32)


def _cut(prompt: Ids, completion: Ids, opening: int, max_length: int) -> tuple[Ids, Ids]:
    """Take away the beginning of a prompt, except its opening: its end says more about the completion."""
    completion = completion[: max_length - opening]
    surplus = max(0, len(prompt) + len(completion) - max_length)
    return np.concatenate([prompt[:opening], prompt[opening + surplus :]]), completion


def _check_room(rows: Sequence[Row], prompts: Sequence[Ids], max_length: int) -> None:
    full = [(row.where, len(prompt)) for row, prompt in zip(rows, prompts, strict=True) if len(prompt) >= max_length]
    if full:
        where, length = full[0]
        others = f" (as in {len(full) - 1} other rows, of up to {max(size for _, size in full)})" if full[1:] else ""
        raise DataError(
            f"{where}: its prompt has {length} tokens{others}, which leaves no room for an answer in --max-length "
            f"{max_length}: raise it, or remove the row"
        )
