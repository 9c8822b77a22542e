"""Prompt templates: what a causal language model reads, and what it learns to answer, made from the columns of a row.

A template is text with placeholders: ``{question}`` is the value of that column, ``{choices[0]}`` the first of a list,
and ``{{`` a brace.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.records import Row, checked_text


@dataclass(frozen=True)
class Placeholder:
    """A column, or one element of a column of lists.

    Attributes:
        column: the column's name.
        index: the place in the list; None for a column of single values.
    """

    column: str
    index: int | None = None


Text = tuple[str | Placeholder, ...]
"""A template's text: what is written as it stands, and placeholders."""


@dataclass(frozen=True)
class Template:
    """How rows become prompts and completions.

    Attributes:
        prompts: the first one without an empty placeholder is used; no prompts if the completion is all there is.
        completion: what follows the prompt.
        names: for columns of whole numbers the names of 0, 1, 2, ..., which are written instead of the number.
        spec: names the template in messages; None if it is a choice of columns.
    """

    prompts: tuple[Text, ...]
    completion: Text
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    spec: str | None = None

    @property
    def answered_in(self) -> str:
        """The columns of the completion, for messages."""
        return ", ".join(repr(place.column) for place in _places(self.completion))

    def prompt_of(self, row: Row) -> str:
        """The prompt of a row; '' for a template without prompts.

        Raises:
            DataError: a placeholder is no column of the row, or its value is not text.
        """
        for prompt in self.prompts[:-1]:
            if all(self._value(row, place, "").strip() for place in _places(prompt)):
                return self._filled(row, prompt)
        return self._filled(row, self.prompts[-1]) if self.prompts else ""

    def completion_of(self, row: Row) -> str:
        """The completion of a row.

        Raises:
            DataError: a placeholder is no column of the row, or its value is not text; or, except for a choice of
                columns, there is nothing but space in it.
        """
        text = self._filled(row, self.completion)
        if self.spec is not None and not text.strip():
            raise DataError(f"{row.where} has an empty answer in {self.answered_in}; remove it")
        return text

    def check(self, rows: Sequence[Row]) -> None:
        """Check that every placeholder is a column: of at least one row, if there are prompts without it.

        Raises:
            DataError: it is not.
        """
        for place in (place for prompt in self.prompts[:-1] for place in _places(prompt)):
            if not any(place.column in row for row in rows):
                raise self._no_column(rows[0], place.column)

    def _filled(self, row: Row, text: Text) -> str:
        return "".join(part if isinstance(part, str) else self._value(row, part) for part in text)

    def _value(self, row: Row, place: Placeholder, missing: str | None = None) -> str:
        """The value as text. A column that is absent is an error, unless ``missing`` stands for it."""
        if place.column not in row:
            if missing is None:
                raise self._no_column(row, place.column)
            return missing
        value = row[place.column]
        where = f"{row.where}, column {place.column!r}"
        if place.index is not None:
            if not isinstance(value, list) or place.index >= len(value):
                raise DataError(f"{where}: no list with a value {place.index}, which the template asks for")
            value = value[place.index]
        names = self.names.get(place.column)
        if names is not None and isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(names):
                raise DataError(f"{where}: {value} is none of the numbers 0 to {len(names) - 1}, which have names")
            return names[value]
        if self.spec is None:
            return checked_text(value, where)
        return _as_text(value, where)

    def _no_column(self, row: Row, column: str) -> DataError:
        has = ", ".join(map(str, row))
        if self.spec is None:
            return DataError(
                f"{row.where} has no column {column!r} (it has: {has}); name another with --text-column, or with "
                "--prompt-column and --completion-column"
            )
        return DataError(
            f"{row.where} has no column {column!r} (it has: {has}), which is a placeholder of --template {self.spec}: "
            "rename one of them, or choose another template"
        )


def of_columns(*columns: str) -> Template:
    """The template of whole texts, of one column, or of a column of prompts and one of completions."""
    *prompts, completion = ((Placeholder(column),) for column in columns)
    return Template(tuple(prompts), completion)


# The wording is part of the Alpaca format: models and data sets of that format expect these words.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
MMLU = "{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nD. {choices[3]}\nAnswer:"
NAMED: dict[str, dict[str, Any]] = {
    "alpaca": {"prompt": [ALPACA, ALPACA_ALONE], "completion": "{output}"},
    "alpaca-no-input": {"prompt": ALPACA_ALONE, "completion": "{output}"},
    "question-answer": {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"},
    "mmlu": {"prompt": MMLU, "completion": " {answer}", "names": {"answer": ["A", "B", "C", "D"]}},
}
"""Templates by name, as a file would have them. The last two ask as lm-eval does in ``gsm8k`` and ``mmlu``."""


def load_template(spec: str) -> Template:
    """Find a template by name, or read it from a JSON file.

    The file has an object with ``prompt``, one text or a list of texts of which the first without an empty column is
    used, ``completion``, and, if needed, ``names``.

    Args:
        spec: a key of ``NAMED``, or the file.

    Raises:
        DataError: there is no such template, or the file is none.
    """
    if spec in NAMED:
        return _parsed(NAMED[spec], spec)
    path = Path(spec).expanduser()
    if not path.is_file():
        near = get_close_matches(spec, NAMED, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise DataError(f"--template {spec}: no such file; {meant}Known by name: {', '.join(NAMED)}")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"--template {spec} cannot be read as JSON ({error})") from error
    return _parsed(found, spec)


def _parsed(found: Any, spec: str) -> Template:
    what = f"--template {spec}"
    if not isinstance(found, dict) or not {"prompt", "completion"} <= found.keys() <= {"prompt", "completion", "names"}:
        raise DataError(f"{what}: expected a JSON object with 'prompt', 'completion' and, if needed, 'names'")
    prompts = found["prompt"] if isinstance(found["prompt"], list) else [found["prompt"]]
    if not prompts or not all(isinstance(text, str) for text in (*prompts, found["completion"])):
        raise DataError(f"{what}: 'prompt' must be a text or a list of texts, and 'completion' a text")
    names = found.get("names", {})
    if not isinstance(names, dict) or not all(
        isinstance(some, list) and all(isinstance(name, str) for name in some) for some in names.values()
    ):
        raise DataError(f"{what}: 'names' must have a list of texts for each column, for its numbers 0, 1, 2, ...")
    *texts, completion = (_text(text, what) for text in (*prompts, found["completion"]))
    for text in (*texts, completion):
        if not _places(text):
            raise DataError(
                f"{what}: a prompt or completion without a placeholder, such as {{question}}, is always equal"
            )
    return Template(tuple(texts), completion, names, spec)


def _text(text: str, what: str) -> Text:
    parts: list[str | Placeholder] = []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(text):
            if literal:
                parts.append(literal)
            if name is None:
                continue
            column, bracket, index = name.partition("[")
            if not column or spec or conversion or (bracket and not index.removesuffix("]").isdecimal()):
                raise ValueError(f"{{{name}}} is no placeholder")
            parts.append(Placeholder(column, int(index.removesuffix("]")) if bracket else None))
    except ValueError as error:
        raise DataError(f"{what}: {error}; write {{column}} or {{column[0]}}, and {{{{ for a brace") from None
    return tuple(parts)


def _places(text: Text) -> list[Placeholder]:
    return [part for part in text if isinstance(part, Placeholder)]


def _as_text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else checked_text(value, where)
