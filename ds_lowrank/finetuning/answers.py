"""Whether a generated answer is right: what is compared, of it and of the answer in the data."""

from __future__ import annotations

import re
from collections.abc import Callable

# What LLM-Adapters' eight commonsense tasks answer with; the first that occurs counts.
OPTION = re.compile(r"true|false|(?:solution|option)[12]|answer[1-5]|ending[1-4]")
LETTER = re.compile(r"\W*([A-Z])(?!\w)")
NUMBER = re.compile(r"#### *\$?(-?[0-9.,]+)")  # lm-eval's "strict-match" of GSM8K


def text(answer: str) -> str | None:
    """All of it, without space at the ends; None if nothing is left."""
    return answer.strip() or None


def number(answer: str) -> str | None:
    """The number after ``####``, as in GSM8K, without thousands separators; None if there is none."""
    found = NUMBER.search(answer)
    return (found[1].replace(",", "").removesuffix(".") or None) if found else None


def option(answer: str) -> str | None:
    """The first of the options of the commonsense tasks, such as ``answer2`` or ``true``; None if there is none."""
    found = OPTION.search(answer)
    return found[0] if found else None


def letter(answer: str) -> str | None:
    """The capital letter that it begins with, as in ``B``, ``(B)`` or ``B. because``; None if it does not."""
    found = LETTER.match(answer)
    return found[1] if found else None


MATCHES: dict[str, Callable[[str], str | None]] = {
    function.__name__: function for function in (text, number, option, letter)
}


def exact_match(match: str, generated: str, answer: str) -> bool:
    """Whether what is compared of both is equal.

    Args:
        match: a key of ``MATCHES``.
        generated: the generated answer.
        answer: the right one.
    """
    found = MATCHES[match](generated)
    return found is not None and found == MATCHES[match](answer)
