"""Documents stored as token ids: a Megatron-LM indexed data set (``PREFIX.bin`` and ``PREFIX.idx``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.files import content_hash
from ds_lowrank.data.split import Split, belongs


@dataclass(frozen=True)
class IndexedTokens:
    """One split of a Megatron-LM indexed data set.

    Attributes:
        name: the data spec, for messages.
        prefix: the path without ``.bin`` and ``.idx``.
        dataset: megatron-core's ``IndexedDataset``, memory-mapped.
        split: the split of the documents.
    """

    name: str
    prefix: str
    dataset: Any
    split: Split

    @classmethod
    def open(cls, spec: str, split: Split) -> IndexedTokens:
        """Open ``megatron:PREFIX``.

        Raises:
            DataError: megatron-core is not installed, or the files are missing or damaged.
        """
        prefix = str(Path(spec.removeprefix("megatron:")).expanduser())
        return cls(spec, prefix, _open_indexed(spec, prefix), split)

    def documents(self) -> Iterator[npt.NDArray[np.integer[Any]]]:
        """Iterate over the non-empty documents of the split, each a 1-D array of token ids.

        Raises:
            DataError: the split has no documents.
        """
        empty = True
        bounds = self.dataset.document_indices
        for number, (first, last) in enumerate(pairwise(bounds)):
            if first == last or not belongs(str(number), self.split):
                continue
            tokens = np.concatenate(self.dataset[int(first) : int(last)])
            if len(tokens):
                empty = False
                yield tokens
        if empty:
            raise DataError(f"{self.name!r} has no {self.split} documents among its {len(bounds) - 1}; give more data")

    def fingerprint(self) -> str:
        """Hash of both files' bytes and the split. Reads both files completely."""
        parts = [content_hash(Path(f"{self.prefix}.{suffix}")) for suffix in ("idx", "bin")]
        return hashlib.sha256(" ".join([*parts, self.split]).encode()).hexdigest()


def _open_indexed(spec: str, prefix: str) -> Any:
    for suffix in ("idx", "bin"):
        if not os.path.isfile(f"{prefix}.{suffix}"):
            raise DataError(f"{spec!r}: no file {prefix}.{suffix}; give the prefix that both .bin and .idx share")
        if not os.path.getsize(f"{prefix}.{suffix}"):
            raise DataError(f"{spec!r}: {prefix}.{suffix} is empty; build it again")
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ImportError as error:
        raise DataError(
            f"{spec!r} needs megatron-core, which cannot be imported ({error}): "
            'pip install "ds-lowrank[megatron]", or give another kind of data'
        ) from error
    dataset = IndexedDataset.__new__(IndexedDataset)
    try:
        dataset.__init__(prefix)
    except Exception as error:  # numpy's, or those of reading an index that has other contents
        dataset.index = dataset.bin_reader = None  # its __del__ would print a traceback
        raise DataError(f"{spec!r}: {prefix}.idx or .bin is damaged ({error}); build it again") from error
    _check_index(dataset, prefix)
    return dataset


def _check_index(dataset: Any, prefix: str) -> None:
    """Check that the index describes all of the data, each sequence after the one before it."""
    if not np.issubdtype(dataset.index.dtype, np.integer):
        raise DataError(
            f"{prefix}.idx says that the ids are {np.dtype(dataset.index.dtype)}: build it with whole numbers"
        )
    sizes = dataset.sequence_lengths.astype(np.int64) * np.dtype(dataset.index.dtype).itemsize
    expected, found = int(sizes.sum()), Path(f"{prefix}.bin").stat().st_size
    if found != expected:
        raise DataError(f"{prefix}.bin has {found} bytes, but its index says {expected}: build both files again")
    bounds = dataset.document_indices
    if (
        (sizes < 0).any()
        or not np.array_equal(dataset.index.sequence_pointers, np.cumsum(sizes) - sizes)
        or (bounds[0], bounds[-1]) != (0, len(sizes))
        or (np.diff(bounds) < 0).any()
    ):
        raise DataError(
            f"{prefix}.idx is damaged: its sequences or documents overlap or are not all there; build it again"
        )
