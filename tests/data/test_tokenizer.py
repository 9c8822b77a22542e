import json
import logging
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.example_tokenizer import load_example_tokenizer
from ds_lowrank.data.tokenizer import load_tokenizer
from ds_lowrank.data.vocabulary import check_id

TEXTS = ["the cat sat on the mat\n" * 30, "a dog, a cat and a mat: naïve 日本\n" * 20, "    indented = code()\n" * 25]
ODD_TEXT = "naïve <|endoftext|> \t日本\n\n  two  spaces , dot .\0 don't"


def texts() -> Iterator[str]:
    return iter(TEXTS)


@pytest.mark.parametrize("spec", ["bpe", "bytes"])
def test_text_survives_the_round_trip_and_a_saved_tokenizer_agrees(spec, tmp_path, cache_dir):
    tokenizer = load_tokenizer(spec, texts, vocab_size=300, cache_dir=cache_dir)
    (ids,) = tokenizer.encode_documents([ODD_TEXT])
    assert tokenizer.decode(ids) == ODD_TEXT
    assert tokenizer.eos_id not in ids  # text that spells the token is text
    assert max(ids) < tokenizer.vocab_size
    tokenizer.save(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.eos_token_id == tokenizer.eos_id and len(loaded) == tokenizer.vocab_size
    assert loaded(ODD_TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    again = load_tokenizer(str(tmp_path / "saved"), texts, cache_dir=cache_dir)
    assert again.encode_documents(TEXTS) == tokenizer.encode_documents(TEXTS)
    assert (again.eos_id, again.fingerprint) == (tokenizer.eos_id, tokenizer.fingerprint)


def test_bytes_are_their_own_ids(byte_tokenizer):
    assert byte_tokenizer.encode_documents([ODD_TEXT, ""]) == [list(ODD_TEXT.encode()), []]
    assert (byte_tokenizer.eos_id, byte_tokenizer.vocab_size) == (256, 257)


def test_bpe_has_the_size_asked_for_and_merges_frequent_pairs(cache_dir):
    tokenizer = load_tokenizer("bpe", texts, vocab_size=270, cache_dir=cache_dir)
    assert tokenizer.vocab_size == 270
    (ids,) = tokenizer.encode_documents([TEXTS[0]])
    assert len(ids) < 0.75 * len(TEXTS[0])  # 13 merges of its commonest pairs
    small = load_tokenizer("bpe", texts, vocab_size=257, cache_dir=cache_dir)
    assert len(small.encode_documents([TEXTS[0]])[0]) == len(TEXTS[0])


def test_bpe_training_is_the_same_in_another_process(cache_dir):
    text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text()
    here = load_tokenizer("bpe", lambda: iter([text]), vocab_size=600, cache_dir=cache_dir).fingerprint
    code = (
        "import sys, pathlib\nfrom ds_lowrank.data.tokenizer import load_tokenizer\n"
        "text, cache = (pathlib.Path(p) for p in sys.argv[1:])\n"
        "print(load_tokenizer('bpe', lambda: iter([text.read_text()]), vocab_size=600, cache_dir=cache).fingerprint)"
    )
    paths = [str(Path(sysconfig.get_path("stdlib"), "argparse.py")), str(cache_dir / "other")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


def test_bpe_is_trained_once_for_the_same_text_and_size(cache_dir, monkeypatch):
    first = load_tokenizer("bpe", texts, vocab_size=300, cache_dir=cache_dir)
    (file,) = cache_dir.glob("bpe-*.json")
    written = file.stat().st_mtime_ns

    def refuse(*_):
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr("ds_lowrank.data.tokenizer._train_bpe", refuse)
        second = load_tokenizer("bpe", texts, vocab_size=300, cache_dir=cache_dir)
    assert second.fingerprint == first.fingerprint and file.stat().st_mtime_ns == written
    load_tokenizer("bpe", texts, vocab_size=301, cache_dir=cache_dir)
    load_tokenizer("bpe", lambda: iter(TEXTS[:2]), vocab_size=300, cache_dir=cache_dir)
    # The texts cut in other places are other data.
    load_tokenizer("bpe", lambda: iter(["".join(TEXTS)]), vocab_size=300, cache_dir=cache_dir)
    assert len(list(cache_dir.glob("bpe-*.json"))) == 4


@pytest.mark.parametrize("damage", ["cut", "one letter", "no checksum"])
def test_damaged_tokenizer_is_trained_again(damage, cache_dir, caplog):
    caplog.set_level(logging.WARNING)
    first = load_tokenizer("bpe", texts, vocab_size=300, cache_dir=cache_dir)
    (file,) = cache_dir.glob("bpe-*.json")
    whole = file.read_text()
    if damage == "cut":
        file.write_text(whole[:1000])
    elif damage == "one letter":
        file.write_text(json.dumps(json.loads(whole)).replace('"cat"', '"car"'))
    else:
        file.with_name(file.name + ".sha256").unlink()
    again = load_tokenizer("bpe", texts, vocab_size=300, cache_dir=cache_dir)
    assert again.fingerprint == first.fingerprint and file.read_text() == whole
    assert "is damaged or was not finished" in caplog.text


def test_bpe_reads_no_more_of_a_stream_than_it_trains_on(cache_dir):
    taken = []

    def endless() -> Iterator[str]:
        while True:
            taken.append(1)
            yield "ten chars " * 10

    load_tokenizer("bpe", endless, vocab_size=260, cache_dir=cache_dir, training_characters=950)
    assert len(taken) == 10


def test_unusable_tokenizers_are_clear_errors(tmp_path, cache_dir, byte_tokenizer):
    with pytest.raises(DataError, match="vocab_size 256 cannot hold every byte"):
        load_tokenizer("bpe", texts, vocab_size=256, cache_dir=cache_dir)
    with pytest.raises(DataError, match=r"no tokenizer folder '\./nowhere'"):
        load_tokenizer("./nowhere", texts, cache_dir=cache_dir)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path), texts, cache_dir=cache_dir)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text('{"model_type": "roberta"}')  # and no tokenizer
    with pytest.raises(DataError, match=r"no tokenizer in '.*weights' \(its vocabulary is empty\)"):
        load_tokenizer(str(tmp_path / "weights"), texts, cache_dir=cache_dir)
    with pytest.raises(DataError, match=r"no tokenizer in '.*weights' \(its vocabulary is empty\)"):
        load_example_tokenizer(str(tmp_path / "weights"), iter(()), 0, cache_dir)
    byte_tokenizer.save(tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "cut"), texts, cache_dir=cache_dir)
    byte_tokenizer.save(tmp_path / "saved")
    config = tmp_path / "saved" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
    with pytest.raises(DataError, match="has no eos_token"):
        load_tokenizer(str(tmp_path / "saved"), texts, cache_dir=cache_dir)


def test_unwritable_cache_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="give another cache folder"):
        load_tokenizer("bpe", texts, vocab_size=300, cache_dir=tmp_path / "file")


def test_an_id_without_an_embedding_is_refused_and_named():
    check_id(256, 257, "data")
    check_id(10**6, None, "data")
    message = r"^'x' uses token id 4100 \('abc'\), .* vocab_size is 4096: use the .* at least 4101 .*: 4224\)$"
    with pytest.raises(DataError, match=message):
        check_id(4100, 4096, "'x'", lambda ids: "abc")
    with pytest.raises(DataError, match="token id 300, but"):
        check_id(300, 300, "'x'")
