import logging
import os
import signal

import numpy as np
import pytest

from ds_lowrank.data import packing
from ds_lowrank.data.cache import ensure_built
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.packing import pack
from ds_lowrank.data.sources import open_source
from ds_lowrank.data.split import split_of
from tests.data.conftest import RECORDS, byte_ids


def expected_tokens(split: str) -> list[int]:
    return byte_ids(text for number, text in enumerate(RECORDS) if split_of(f"records.jsonl\n{number}") == split)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_are_joined_by_eos_and_cut_into_blocks(jsonl, byte_tokenizer, cache_dir, split):
    data = pack(open_source(str(jsonl), split), byte_tokenizer, sequence_length=16, cache_dir=cache_dir)
    tokens = expected_tokens(split)
    assert data.tokens.tolist() == tokens and data.tokens.dtype == np.uint16
    assert (len(data), data.largest_id) == (len(tokens) // 16, 256)
    rows = data.rows(np.array([3, 0]))
    assert rows.dtype.is_floating_point is False and rows.element_size() == 8
    assert rows.tolist() == [tokens[48:64], tokens[:16]]


def test_wide_vocabulary_is_kept_in_32_bits(jsonl, byte_tokenizer, cache_dir, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "vocab_size", 2**16 + 1)
    data = pack(open_source(str(jsonl), "train"), byte_tokenizer, sequence_length=16, cache_dir=cache_dir)
    assert data.tokens.dtype == np.uint32 and data.tokens.tolist() == expected_tokens("train")


def test_second_run_reads_the_cache_whatever_the_sequence_length(jsonl, byte_tokenizer, cache_dir, monkeypatch):
    source = open_source(str(jsonl), "train")
    first = pack(source, byte_tokenizer, sequence_length=16, cache_dir=cache_dir)

    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(byte_tokenizer, "encode_documents", refuse)
    second = pack(source, byte_tokenizer, sequence_length=32, cache_dir=cache_dir)
    assert second.tokens.tolist() == first.tokens.tolist() and second.fingerprint == first.fingerprint
    jsonl.write_text(jsonl.read_text() + '{"text": "one more"}\n')
    with pytest.raises(AssertionError, match="tokenised again"):
        pack(source, byte_tokenizer, sequence_length=16, cache_dir=cache_dir)
    names = sorted(path.name for path in cache_dir.iterdir())
    assert names == [f"tokens-{first.fingerprint}.npy", f"tokens-{first.fingerprint}.npy.sha256"]


@pytest.mark.parametrize("damage", ["cut", "one bit", "unfinished"])
def test_damaged_cache_is_built_again(jsonl, byte_tokenizer, cache_dir, caplog, damage):
    caplog.set_level(logging.WARNING)
    source = open_source(str(jsonl), "train")
    fingerprint = pack(source, byte_tokenizer, sequence_length=16, cache_dir=cache_dir).fingerprint
    file = cache_dir / f"tokens-{fingerprint}.npy"
    whole = file.read_bytes()
    if damage == "cut":
        os.truncate(file, len(whole) - 100)
    elif damage == "one bit":
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    else:
        (cache_dir / f"{file.name}.sha256").unlink()
    again = pack(source, byte_tokenizer, sequence_length=16, cache_dir=cache_dir)
    assert again.tokens.tolist() == expected_tokens("train") and file.read_bytes() == whole
    assert "is damaged or was not finished" in caplog.text


def test_interrupted_build_leaves_nothing_behind(jsonl, byte_tokenizer, cache_dir, monkeypatch):
    monkeypatch.setattr(packing, "DOCUMENTS_PER_BATCH", 50)
    calls = []
    encode = byte_tokenizer.encode_documents

    def fail_on_third(documents):
        calls.append(len(documents))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(documents)

    monkeypatch.setattr(byte_tokenizer, "encode_documents", fail_on_third)
    with pytest.raises(KeyboardInterrupt):
        pack(open_source(str(jsonl), "train"), byte_tokenizer, sequence_length=16, cache_dir=cache_dir)
    assert calls == [50, 50, 50] and list(cache_dir.iterdir()) == []


def test_an_id_without_an_embedding_is_refused_also_from_the_cache(jsonl, byte_tokenizer, cache_dir):
    source = open_source(str(jsonl), "train")
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"records.jsonl' uses token id 256 \('<\|endoftext\|>'\), .* is 256: use the"
        ):
            pack(source, byte_tokenizer, sequence_length=16, cache_dir=cache_dir, model_vocab=256)
    byte_tokenizer.vocab_size = 999  # more tokens than the data use
    assert pack(source, byte_tokenizer, sequence_length=16, cache_dir=cache_dir, model_vocab=257).largest_id == 256


def test_what_a_killed_build_left_is_removed_and_what_others_build_is_not(jsonl, byte_tokenizer, cache_dir):
    source = open_source(str(jsonl), "train")
    running, parent = os.pipe(), os.getpid()

    def stopped_inside(_):
        os.write(running[1], b"x")
        os.kill(os.getpid(), signal.SIGSTOP)

    child = os.fork()
    if child == 0:
        ensure_built(cache_dir / "other", stopped_inside)
        os._exit(0)
    assert os.getpid() == parent and os.read(running[0], 1) == b"x"
    foreign = cache_dir / ".building-mine"
    foreign.mkdir()
    pack(source, byte_tokenizer, sequence_length=16, cache_dir=cache_dir)
    assert len(list(cache_dir.glob(".building-*"))) == 2  # the child is alive
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pack(source, byte_tokenizer, sequence_length=16, cache_dir=cache_dir)
    assert list(cache_dir.glob(".building-*")) == [foreign]


def test_text_without_a_tokenizer_and_tiny_sequences_are_refused(jsonl, byte_tokenizer, cache_dir):
    source = open_source(str(jsonl), "train")
    with pytest.raises(DataError, match="is text: give a tokenizer"):
        pack(source, None, sequence_length=16, cache_dir=cache_dir)
    with pytest.raises(DataError, match="sequence_length 1: use 2 or more"):
        pack(source, byte_tokenizer, sequence_length=1, cache_dir=cache_dir)
