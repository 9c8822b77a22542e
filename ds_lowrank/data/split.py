"""Which documents are held out for validation.

A document is held out when the 64-bit hash of its key falls in the lowest part of the range, by default a twentieth.
The key is the document's own (its path, its record number, its text): adding or removing other documents moves no
document from one split to the other.
"""

import hashlib
from typing import Literal, get_args

from ds_lowrank.data.errors import DataError

Split = Literal["train", "validation"]

HELD_OUT_FRACTION = 0.05


def check_split(split: str) -> None:
    """Raises DataError unless `split` is one of the two names."""
    if split not in get_args(Split):
        raise DataError(f"unknown split {split!r}: use 'train' or 'validation'")


def split_of(key: str, held_out: float = HELD_OUT_FRACTION) -> Split:
    """The split of the document with this key, where a fraction `held_out` of all is for validation."""
    return "validation" if split_key(key) < held_out * 2**64 else "train"


def split_key(key: str) -> int:
    """The 64-bit hash that decides."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
