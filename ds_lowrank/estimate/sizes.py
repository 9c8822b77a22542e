"""Sizes of memory as people write and read them."""

from __future__ import annotations

import re

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_size(text: str) -> int:
    """Bytes of a size such as ``24GB`` (24 x 10^9) or ``24GiB`` (24 x 2^30).

    Args:
        text: a number and a unit.

    Raises:
        ValueError: it is no such size, or less than a byte.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?i?B)", text.strip(), re.IGNORECASE | re.ASCII)
    factor = UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * factor) if found and factor else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size of memory: write 24GB or 24GiB, for example")
    return size


def size_text(size: float) -> str:
    """Bytes in GB or MB of powers of ten.

    Args:
        size: the bytes.
    """
    if size == 0:
        return "-"
    for unit in ("GB", "MB", "kB"):
        factor = UNITS[unit.upper()]
        if size >= 0.9995 * factor:
            digits = 2 if unit == "GB" else 1
            return f"{size / factor:.{digits}f} {unit}"
    return f"{size:.0f} B"
