import builtins
from pathlib import Path

import numpy as np
import pytest

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.packing import pack
from ds_lowrank.data.sources import open_source
from ds_lowrank.data.split import split_of
from tests.data.conftest import joined

DOCUMENTS = [[number % 250, *range(3 + number % 5)] if number % 10 else [] for number in range(121)]


def of_split(split: str) -> list[list[int]]:
    return [document for number, document in enumerate(DOCUMENTS) if document and split_of(str(number)) == split]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_are_dealt_by_their_number(megatron_prefix, split):
    source = open_source(f"megatron:{megatron_prefix(DOCUMENTS)}", split)
    assert [document.tolist() for document in source.documents()] == of_split(split)


def test_packed_without_a_tokenizer_as_they_are_and_with_one_ended_by_its_eos(
    megatron_prefix, byte_tokenizer, cache_dir
):
    spec = f"megatron:{megatron_prefix(DOCUMENTS)}"
    plain = pack(open_source(spec, "train"), None, sequence_length=8, cache_dir=cache_dir)
    assert plain.tokens.tolist() == joined(of_split("train"))
    assert plain.largest_id == max(map(max, of_split("train")))
    ended = pack(open_source(spec, "train"), byte_tokenizer, sequence_length=8, cache_dir=cache_dir)
    assert ended.tokens.tolist() == joined(of_split("train"), 256)
    assert ended.largest_id == 256


def test_document_that_ends_in_eos_gets_no_second_one(megatron_prefix, byte_tokenizer, cache_dir):
    source = open_source(f"megatron:{megatron_prefix([[1, 2, 256]] * 30)}", "train")
    tokens = pack(source, byte_tokenizer, sequence_length=3, cache_dir=cache_dir).tokens
    assert tokens.tolist() == [1, 2, 256] * (len(tokens) // 3) and len(tokens) > 60


def test_ids_that_the_tokenizer_lacks_are_refused(megatron_prefix, byte_tokenizer, cache_dir):
    source = open_source(f"megatron:{megatron_prefix([[1, 300]] * 30)}", "train")
    with pytest.raises(DataError, match="token ids from 1 to 300, outside 0 to 256"):
        pack(source, byte_tokenizer, sequence_length=3, cache_dir=cache_dir)
    assert list(cache_dir.iterdir()) == []


def test_damaged_or_missing_files_are_clear_errors(megatron_prefix):
    prefix = megatron_prefix(DOCUMENTS)
    with pytest.raises(DataError, match=r"no file .*other\.idx"):
        open_source(f"megatron:{prefix}-other", "train")
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=f"has {len(whole) - 4} bytes, but its index says {len(whole)}"):
        open_source(f"megatron:{prefix}", "train")
    data.write_bytes(b"")
    with pytest.raises(DataError, match=r"indexed.bin is empty"):
        open_source(f"megatron:{prefix}", "train")
    data.write_bytes(whole)
    index.write_bytes(b"not an index" * 9)
    with pytest.raises(DataError, match=r"idx or .bin is damaged"):
        open_source(f"megatron:{prefix}", "train")


@pytest.mark.parametrize("field", ["sequence_lengths", "sequence_pointers", "document_indices"])
def test_an_index_that_contradicts_itself_is_refused(megatron_prefix, field):
    prefix = megatron_prefix([[1, 2, 3, 4], [5, 6, 7, 8]])  # four sequences of two
    assert len(list(open_source(f"megatron:{prefix}", "all").documents())) == 2
    path = Path(f"{prefix}.idx")
    whole = bytearray(path.read_bytes())
    start = {"sequence_lengths": 34, "sequence_pointers": 34 + 4 * 4, "document_indices": 34 + 4 * 4 + 4 * 8}[field]
    size = 4 if field == "sequence_lengths" else 8
    whole[start : start + 2 * size] = whole[start + size : start + 2 * size] + whole[start : start + size]
    if field == "sequence_lengths":  # the same sum
        whole[start : start + 8] = np.array([5, -1], np.int32).tobytes()
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"indexed.idx is damaged: its sequences or documents overlap"):
        open_source(f"megatron:{prefix}", "train")


def test_split_without_documents_is_a_clear_error(megatron_prefix):
    source = open_source(f"megatron:{megatron_prefix([[1, 2]])}", "validation")
    with pytest.raises(DataError, match="no validation documents among its 1"):
        list(source.documents())


def test_missing_megatron_core_names_the_extra_to_install(tmp_path, monkeypatch):
    for suffix in ("bin", "idx"):
        np.zeros(4, np.int32).tofile(tmp_path / f"some.{suffix}")
    imported = builtins.__import__

    def without_megatron(name, *args, **kwargs):
        if name.startswith("megatron"):
            raise ImportError("No module named 'megatron'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_megatron)
    with pytest.raises(DataError, match=r'pip install "ds-lowrank\[megatron\]"'):
        open_source(f"megatron:{tmp_path / 'some'}", "train")
