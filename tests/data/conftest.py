"""Data in every form the pipeline reads, made in temporary folders."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from ds_lowrank.data.tokenizer import TextTokenizer, load_tokenizer

RECORDS = [f"document {number} " + "word " * (number % 7) for number in range(200)]


def joined(documents: Iterable[Iterable[int]], *ends: int) -> list[int]:
    """One list of the documents' ids, `ends` after each."""
    return [token for document in documents for token in (*document, *ends)]


def byte_ids(texts: Iterable[str]) -> list[int]:
    """What the byte tokenizer makes of the texts, packed."""
    return joined((text.encode() for text in texts), 256)


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> TextTokenizer:
    def no_documents() -> Iterator[str]:
        raise AssertionError("the byte tokenizer needs no data")

    return load_tokenizer("bytes", no_documents, cache_dir=tmp_path / "unused")


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """200 records, `RECORDS`."""
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in RECORDS))
    return path


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A local data set for `datasets`: train in three shards of 100 documents, validation in one of 20."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for shard in range(3):
        lines = [json.dumps({"text": f"shard {shard} document {number}"}) for number in range(100)]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"text": f"held out {number}"}) for number in range(20)]
    (folder / "validation-0.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def megatron_prefix(tmp_path: Path) -> Callable[[list[list[int]]], str]:
    """Builds `.bin` and `.idx` of the given documents with megatron-core and returns their prefix."""
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import numpy as np
    import torch

    def build(documents: list[list[int]]) -> str:
        prefix = str(tmp_path / "indexed")
        builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for document in documents:
            # Two sequences a document, and none where it is empty: `document_indices` bounds documents.
            half = len(document) // 2
            builder.add_document(torch.tensor(document), [half, len(document) - half] if document else [])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return build
