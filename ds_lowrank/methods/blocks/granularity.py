"""VLoRP's granularity as JSON and checkpoints hold it: units per row, a number or a fraction."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator


def parse_granularity(value: Any) -> int | str:
    """A number or ``"p/q"`` as an int, or as ``"p/q"`` in lowest terms.

    Raises:
        ValueError: it is neither, or not positive.
    """
    try:
        c = Fraction(value) if isinstance(value, str) else Fraction(value).limit_denominator(1_000_000)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError("a granularity is a positive number or a fraction like '1/4'") from None
    if c <= 0 or isinstance(value, bool):
        raise ValueError("a granularity is a positive number or a fraction like '1/4'")
    return int(c) if c.denominator == 1 else f"{c.numerator}/{c.denominator}"


Granularity = Annotated[int | str, BeforeValidator(parse_granularity)]
"""The type of an option."""


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
