"""Which documents are held out for validation.

A document is held out when the 64-bit hash of its key is in the lowest part of the range, by default a twentieth. The
key depends only on the document itself (its path, its record number or its text), so adding or removing other documents
never moves a document from one split to the other. A run that evaluates nothing trains on ``all`` documents.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

from ds_lowrank.data.errors import DataError

Split = Literal["train", "validation", "all"]

HELD_OUT_FRACTION = 0.05


def check_split(split: str) -> None:
    """Check that ``split`` is ``train``, ``validation`` or ``all``.

    Raises:
        DataError: it is none of them.
    """
    if split not in get_args(Split):
        raise DataError(f"unknown split {split!r}: use 'train', 'validation' or 'all'")


def split_of(key: str, held_out: float = HELD_OUT_FRACTION) -> Split:
    """The split that the document with this key belongs to.

    Args:
        key: identifies the document independently of all others.
        held_out: the fraction of all documents that is held out for validation, 0 to 1.
    """
    return "validation" if split_key(key) < held_out * 2**64 else "train"


def belongs(key: str, split: Split) -> bool:
    """Whether the document with this key is in a split.

    Args:
        key: identifies the document independently of all others.
        split: the split; every document is in ``all``.
    """
    return split == "all" or split_of(key) == split


def split_key(key: str) -> int:
    """The 64-bit hash of a key, uniform in 0 to 2^64 - 1; compared with a threshold by ``split_of``."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
