import errno
import gzip
import hashlib
import json
import os
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.sources import open_source, text_blocks
from ds_lowrank.data.split import split_of
from tests.data.conftest import RECORDS

SPLITS = ("train", "validation")


def documents(spec: Path | str, split: str, **options: str) -> list[str]:
    return list(open_source(str(spec), split, **options).documents())


def of_split(split: str, name: str) -> list[str]:
    return [text for number, text in enumerate(RECORDS) if split_of(f"{name}\n{number}") == split]


def test_split_of_is_the_documented_hash():
    digest = hashlib.blake2b(b"some key", digest_size=8).digest()
    assert split_of("some key") == ("validation" if int.from_bytes(digest, "big") < 2**64 / 20 else "train")
    held_out = sum(split_of(str(number)) == "validation" for number in range(20_000))
    assert abs(held_out - 1000) < 160  # five standard deviations of a binomial


def test_standard_library_is_sorted_source_text_without_installed_packages():
    root = Path(sysconfig.get_path("stdlib"))
    keys = [path.relative_to(root).as_posix() for path in open_source("stdlib", "train").paths]
    assert keys == sorted(keys)
    assert "argparse.py" in keys and "json/decoder.py" in keys
    assert not [key for key in keys if "site-packages" in key or not key.endswith(".py")]
    held_out = [key for key in keys if split_of(key) == "validation"]
    assert 0.03 < len(held_out) / len(keys) < 0.07
    texts = [(root / key).read_bytes() for key in held_out]
    assert documents("stdlib", "validation") == [text.decode() for text in texts if text and is_utf8(text)]
    assert split_of("argparse.py") == "train"
    assert (root / "argparse.py").read_text() in documents("stdlib", "train")


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def write_jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps({"text": text}) for text in RECORDS))


def write_array(path: Path) -> None:
    path.write_text("\n " + json.dumps([{"text": text} for text in RECORDS], indent=1))


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress("\n".join(json.dumps({"text": text}) for text in RECORDS).encode()))


def write_zst(path: Path) -> None:
    # Two frames in a row, as parallel compressors write them.
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in RECORDS]
    compressed = [zstandard.compress(b"".join(part)) for part in (lines[:90], lines[90:])]
    path.write_bytes(b"".join(compressed))


def write_parquet(path: Path) -> None:
    table = pyarrow.table({"id": list(range(len(RECORDS))), "text": RECORDS})
    pyarrow.parquet.write_table(table, path, row_group_size=37)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.json", write_jsonl),
        ("a.json", write_array),
        ("a.jsonl.gz", write_gz),
        ("a.json.zst", write_zst),
        ("a.parquet", write_parquet),
    ],
)
def test_every_record_format_gives_the_same_records_dealt_by_number(tmp_path, name, write):
    write(tmp_path / name)
    for split in SPLITS:
        assert documents(tmp_path / name, split) == of_split(split, name)
        assert documents(tmp_path, split) == of_split(split, name)  # a folder of one record file: the same keys


def test_text_field_is_a_choice(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in RECORDS))
    assert documents(path, "train", text_field="content") == of_split("train", path.name)
    with pytest.raises(DataError, match=r"a.jsonl, line 1: no text in the field 'text' \(fields: content\)"):
        documents(path, "train")


def test_folder_is_walked_sorted_and_dealt_by_path(tmp_path, caplog):
    texts = {f"{folder}/{number:03}.txt": f"{folder} {number}" for folder in "ba" for number in range(60)}
    for key, text in texts.items():
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_text(text)
    (tmp_path / "a" / "zip.md.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "a" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "a" / "void.txt").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    assert split_of("a/zip.md.gz") == split_of("a/latin.txt") == "train"
    texts["a/zip.md.gz"] = "packed"
    for split in SPLITS:
        assert documents(tmp_path, split) == [texts[key] for key in sorted(texts) if split_of(key) == split]
    assert "left out, " in caplog.text


def test_single_text_is_cut_into_blocks_that_are_dealt_by_their_text(tmp_path):
    paragraphs = [f"paragraph {number}\n" + "some more words\n" * 60 + "\n" for number in range(1000)]
    text = "".join(paragraphs)
    # A paragraph has 960 characters and more, 4096 are reached inside the fifth.
    blocks = ["".join(paragraphs[start : start + 5]) for start in range(0, 1000, 5)]
    path = tmp_path / "book.txt"
    path.write_text(text)
    validation, train = documents(path, "validation"), documents(path, "train")
    assert "".join(validation) == "".join(block for block in blocks if split_of(block) == "validation")
    assert "".join(train) == "".join(block for block in blocks if split_of(block) == "train")
    assert len(train) > 1 and all(text.count(document) == 1 for document in train + validation)


def test_block_without_blank_lines_ends_after_16384_characters_at_a_line():
    line = "x" * 99 + "\n"
    text = "".join(f"{number:05}" + line for number in range(4000))
    pieces = [piece for split in SPLITS for piece in text_blocks(text.splitlines(keepends=True), split)]
    assert sum(map(len, pieces)) == len(text)
    assert all(len(piece) % (105 * 157) == 0 for piece in pieces if not text.endswith(piece))  # 157 lines: 16485


@pytest.mark.parametrize("name", ["records.jsonl", "folder"])
def test_fingerprint_is_of_the_content_and_the_split(tmp_path, jsonl, name):
    if name == "folder":
        (tmp_path / "folder").mkdir()
        jsonl.rename(tmp_path / "folder" / "records.jsonl")
    path = tmp_path / name
    file = path / "records.jsonl" if path.is_dir() else path
    first = open_source(str(path), "train").fingerprint()
    file.touch()
    assert open_source(str(path), "train").fingerprint() == first
    assert open_source(str(path), "validation").fingerprint() != first
    assert open_source(str(path), "train", text_field="other").fingerprint() != first
    file.write_text(file.read_text().replace("document 7", "document 8"))
    assert open_source(str(path), "train").fingerprint() != first


BAD_FILES = {
    "cut.jsonl.gz": (gzip.compress(json.dumps({"text": "word " * 999}).encode())[:-9], "damaged or cut short"),
    "cut.jsonl.zst": (zstandard.compress(json.dumps({"text": "word"}).encode())[:-5], "damaged or cut short"),
    "not.jsonl.gz": (b"plain text", "damaged or cut short"),
    "not.parquet": (b"plain text", "cannot be read as parquet"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken.jsonl, line 2: not JSON"),
    "broken.json": (b'[{"text": "a"}, ', r"broken.json, record 1: not JSON"),
    "number.jsonl": (b'\n{"text": 3}\n', "number.jsonl, line 2: no text in the field 'text'"),
    "list.jsonl": (b'"just a string"\n', "expected an object with a 'text' field, found str"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    "latin.txt": ("a\nb\ncaf\xe9".encode("latin-1"), "latin.txt, line 3: not UTF-8 text"),
    "empty.txt": (b"", "holds no text to train on"),
    "empty.jsonl": (b"\n", "holds no text to train on"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_file_is_a_clear_error(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / name, "train")


def test_parquet_without_the_column_or_with_a_null_is_a_clear_error(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text' \(columns: body\)"):
        documents(tmp_path / "a.parquet", "train")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="record 1: no text"):
        documents(tmp_path / "b.parquet", "train")


def test_missing_or_empty_data_and_unknown_splits_are_clear_errors(tmp_path):
    with pytest.raises(DataError, match=r"no data at 'nowhere\.txt'"):
        open_source("nowhere.txt", "train")
    with pytest.raises(DataError, match="no data files in the folder"):
        open_source(str(tmp_path), "train")
    with pytest.raises(DataError, match="unknown split 'test'"):
        open_source("stdlib", "test")
    (tmp_path / "few.txt").write_text("one short text")
    with pytest.raises(DataError, match="holds no validation text: about one document in twenty"):
        documents(tmp_path / "few.txt", "validation")


def test_all_documents_are_those_of_both_splits(tmp_path, jsonl):
    text = "".join(f"paragraph {number}\n" + "some more words\n" * 300 + "\n" for number in range(300))
    (tmp_path / "book.txt").write_text(text)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"text {number}")
    assert documents(jsonl, "all") == RECORDS
    assert documents(folder, "all") == [f"text {number}" for number in range(60)]
    both = [text for split in SPLITS for text in documents(tmp_path / "book.txt", split)]
    assert sorted(documents(tmp_path / "book.txt", "all")) == sorted(both)
    assert "".join(documents(tmp_path / "book.txt", "all")) == text


def test_a_subfolder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    scan = os.scandir

    def refuse(path):  # as to root a folder is never closed
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for spec in (f"{tmp_path}", f"hf:{tmp_path}"):
        with pytest.raises(
            DataError, match=r"the folder .*closed cannot be read \(Permission denied\): make it readable"
        ):
            open_source(spec, "train")


def test_links_are_followed_and_what_leads_nowhere_is_an_error(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for made in (folder, elsewhere):
        made.mkdir()
    (folder / "a.txt").write_text("here")
    (elsewhere / "b.txt").write_text("there")
    (folder / "linked").symlink_to(elsewhere)
    assert documents(folder, "all") == ["here", "there"]
    (elsewhere / "back").symlink_to(folder)
    with pytest.raises(DataError, match="back is a link to a folder that it is in itself"):
        documents(folder, "all")
    (elsewhere / "back").unlink()
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"broken.txt is neither a file nor a folder, or a broken link"):
        documents(folder, "all")
    (folder / "broken.txt").unlink()
    os.mkfifo(folder / "pipe.txt")  # reading it would wait for ever
    with pytest.raises(DataError, match=r"pipe.txt is neither a file nor a folder"):
        documents(folder, "all")
    with pytest.raises(DataError, match="no data at ''"):
        open_source("", "train")
