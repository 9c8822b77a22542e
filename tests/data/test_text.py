"""Encodings, byte order marks, compressions and sizes that text files come in."""

import codecs
import csv
import gzip
import json
import random
import tracemalloc

import pytest
import zstandard

from ds_lowrank.data import json_records as json_module
from ds_lowrank.data import packing, sources
from ds_lowrank.data.errors import DataError, NotTextError
from ds_lowrank.data.json_records import json_records
from ds_lowrank.data.records import read_rows
from ds_lowrank.data.sources import open_source
from ds_lowrank.data.text import read_text

TEXT = "naïve 日本\r\n  second line 😀\n"
MARKED = {
    "utf-8": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16-le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32-le": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
}


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("compress", [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_byte_order_mark_is_no_text_and_names_the_encoding(tmp_path, encoding, compress):
    suffix, packed = compress
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed(MARKED[encoding]))
    assert read_text(path) == TEXT
    assert list(open_source(str(path), "all").documents()) == [TEXT]
    assert list(open_source(str(tmp_path), "all").documents()) == [TEXT]


ROWS = [{"text": "naïve, 日本", "label": "1"}, {"text": "two\nlines", "label": "2"}]
AS_FILE = {
    "a.csv": 'text,label\n"naïve, 日本",1\n"two\nlines",2\n',
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "a.json": json.dumps(ROWS, ensure_ascii=False, indent=1),
}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", AS_FILE)
def test_rows_of_a_file_with_a_mark_are_those_without_it(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(AS_FILE[name].encode(encoding))
    assert read_rows(tmp_path / name) == ROWS
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(AS_FILE[name].encode(encoding)))
    assert read_rows(tmp_path / f"{name}.gz") == ROWS


def test_text_cut_inside_a_character_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(MARKED["utf-16-le"][:-1])
    with pytest.raises(NotTextError, match=r"a.txt: not UTF-16 text .*truncated"):
        read_text(path)
    path.write_bytes("a\nb\ncafé".encode()[:-1])
    with pytest.raises(NotTextError, match=r"a.txt, line 3: not UTF-8 text"):
        read_text(path)


def test_a_csv_field_may_be_longer_than_the_modules_limit(tmp_path):
    limit = csv.field_size_limit()
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{'x' * (2 * limit)},1\n")
    assert read_rows(path) == [{"text": "x" * (2 * limit), "label": "1"}]
    assert csv.field_size_limit() == limit


def test_an_integer_may_have_more_digits_than_python_converts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": {"9" * 5000}, "text": "a"}}\n')
    assert list(open_source(str(path), "all").documents()) == ["a"]


def test_zstandard_with_a_window_beyond_the_librarys_limit_is_read(tmp_path):
    """``zstd --long=31``, in two frames and with one to skip: 2 MB, so that the content does not shrink the window."""
    text = "".join(f"{number}\n" for number in range(300_000))
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    frames = []
    for part in (text[:1_000_000], text[1_000_000:]):
        writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        frames.append(writer.compress(part.encode()) + writer.flush())
    skipped = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(frames[0] + skipped + frames[1])
    assert read_text(path) == text
    path.write_bytes(frames[0] + frames[1][:-9])
    with pytest.raises(DataError, match=r"a.txt.zst: cannot be decompressed, .* \(it ends inside a frame\)"):
        read_text(path)


@pytest.mark.parametrize("piece", [1, 2, 7, 10**6])
@pytest.mark.parametrize(
    "value", [[], [1], [12, "a]b", {"c": [1, {"d": "\\"}]}, None, 3.5e2, "é😀"], [[]], [{"text": "x" * 100}] * 20]
)
def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, value, piece):
    monkeypatch.setattr(json_module, "PIECE", piece)
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text("\n \n" + json.dumps(value, indent=indent) + "\n ")
        found = list(json_records(path))
        assert [record for _, record in found] == value
        assert [where for where, _ in found] == [f"{path}, record {number}" for number in range(len(value))]


@pytest.mark.parametrize("piece", [1, 10**6])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "record 1: not JSON .*cut short"),
        ("[1, 2,]", "record 2: not JSON"),
        ("[1 2]", "record 0: not JSON .*expected ',' or '\\]'"),
        ("[1] 2", "more after the array: '2'"),
        ('["a', "record 0: not JSON .*Unterminated string"),
        ("[" * 100_000, "record 0: not JSON .*recursion"),
        ('{"a": 1} {"b": 2}\n', "line 1: not JSON .*more than one value"),
        ("\n{" + '"a":{' * 100_000, "line 2: not JSON .*recursion"),
    ],
)
def test_what_is_no_json_is_named_by_record_or_line(tmp_path, monkeypatch, text, message, piece):
    if piece == 1 and len(text) > 100:
        pytest.skip("the same in one piece")
    monkeypatch.setattr(json_module, "PIECE", piece)
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(json_records(path))


def test_documents_of_text_files_end_at_a_bounded_length(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_DOCUMENT_CHARACTERS", 100)
    path = tmp_path / "a.txt"
    lines = [f"line number {number:03}\n" for number in range(50)]  # 16 characters: 7 lines reach 100
    path.write_text("".join(lines))
    of_folder = list(open_source(str(tmp_path), "all").documents())
    assert of_folder == ["".join(lines[start : start + 7]) for start in range(0, 50, 7)]
    path.write_text("x" * 950)  # one line, which cannot end in time
    assert [len(text) for text in open_source(str(tmp_path), "all").documents()] == [200] * 4 + [150]
    assert "".join(open_source(str(path), "all").documents()) == "x" * 950


@pytest.mark.parametrize("layout", ["a.txt", "folder", "one line", "array", "a.txt.gz", "a.txt.zst"])
def test_a_file_is_never_in_memory_as_a_whole(tmp_path, monkeypatch, layout):
    for module, name in ((sources, "LONGEST_DOCUMENT_CHARACTERS"), (packing, "CHARACTERS_PER_BATCH")):
        monkeypatch.setattr(module, name, 2**14)
    monkeypatch.setattr(json_module, "PIECE", 2**14)
    path = tmp_path / {"array": "big.json"}.get(layout, layout if "." in layout else "big.txt")
    lines = random.Random(0).randbytes(2**21).hex(" ", -100).split(" ")
    content = (" " if layout == "one line" else "\n").join(lines).encode()
    if layout == "array":
        content = json.dumps([{"text": line} for line in lines]).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    del content, lines
    tracemalloc.start()
    source = open_source(str(tmp_path if layout == "folder" else path), "all")
    size = sum(len(text) for batch in packing.batched_documents(source.documents()) for text in batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 0.95 * 2**22
    # Some copies of what is read at a time, 16 KB here and a zstandard block: measured 0.2 to 1.1 MB, of 4 MB.
    assert peak < 2**21
