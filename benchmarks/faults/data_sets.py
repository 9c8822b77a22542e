"""Trials of folders, labels, token ids, tokenizers and configurations of models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.data_files import closed
from benchmarks.faults.data_reading import ROWS, as_jsonl, named, read_rows, read_texts, trial
from benchmarks.faults.trial import Trial
from ds_lowrank.data.packing import pack
from ds_lowrank.data.sources import open_source
from ds_lowrank.data.tokenizer import load_tokenizer
from ds_lowrank.models.llama import config_of_folder, load_config

TEXTS = ["here", "there"]
MODEL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip

TYPE, LENGTHS = 17, 34  # where an index has the code of its dtype, and the lengths of its sequences
INDEXED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "bin cut short": ("bin", lambda content: content[:-4]),
    "bin too long": ("bin", lambda content: content * 2),
    "bin empty": ("bin", lambda content: b""),
    "bin of another": ("bin", lambda content: b"x" * 99),
    "idx cut short": ("idx", lambda content: content[:-9]),
    "idx cut in its head": ("idx", lambda content: content[:12]),
    "idx empty": ("idx", lambda content: b""),
    "idx of another": ("idx", lambda content: b"x" * 99),
    "idx with lengths exchanged": ("idx", lambda content: _with(content, LENGTHS, np.array([2, 4], np.int32))),
    "idx with a negative length": ("idx", lambda content: _with(content, LENGTHS, np.array([8, -2], np.int32))),
    "idx with an unknown type": ("idx", lambda content: _with(content, TYPE, np.array([99], np.uint8))),
    "idx with real numbers": ("idx", lambda content: _with(content, TYPE, np.array([7], np.uint8))),
}


def _with(content: bytes, start: int, replaced: np.ndarray[Any, Any]) -> bytes:
    found = replaced.tobytes()
    return content[:start] + found + content[start + len(found) :]


def folder_trials() -> Iterator[Trial]:
    """Folders of files, for pre-training and for ``datasets``."""

    def made(*extra: Callable[[Path], Any]) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            data = folder / "texts"
            (data / "closed").mkdir(parents=True)
            (data / "a.txt").write_text(TEXTS[0])
            (data / "closed" / "b.txt").write_text(TEXTS[1])
            for change in extra:
                change(data)
            return data

        return write

    yield trial("folder: sound", made(), read_texts, TEXTS)
    yield trial("folder: an unreadable subfolder", made(), partial(closed, read_texts), message="closed cannot be read")
    outside = made(
        lambda data: (data / "closed").rename(data.parent / "z"), lambda data: _link(data / "z", data.parent / "z")
    )
    yield trial("folder: a link to another folder", outside, read_texts, TEXTS)
    for name, change in {
        "a link to itself": lambda data: _link(data / "closed" / "back", data),
        "a link to the folder above": lambda data: _link(data / "up", data.parent),
        "a broken link": lambda data: _link(data / "b.txt", data / "nowhere"),
        "a link in a circle": lambda data: _link(data / "b.txt", data / "b.txt"),
        "a pipe": lambda data: os.mkfifo(data / "b.txt"),
        "a damaged file of records": lambda data: (data / "b.jsonl").write_text("{"),
        "a damaged archive": lambda data: (data / "b.txt.gz").write_text("no archive"),
    }.items():
        place = {"a link to itself": "back", "a link to the folder above": "up"}.get(name, "b.")
        yield trial(f"folder: {name}", made(change), read_texts, message=place)
    ignored = made(lambda data: (data / "photo.jpg").write_bytes(bytes(range(256))), lambda data: (data / ".x").mkdir())
    yield trial("folder: a picture among the texts", ignored, read_texts, TEXTS)
    yield trial("folder: a folder called c.txt", made(lambda data: (data / "c.txt").mkdir()), read_texts, TEXTS)
    yield trial("folder: empty files", made(lambda data: (data / "c.txt").touch()), read_texts, TEXTS)
    yield from _hub_trials(made)


def _hub_trials(made: Callable[..., Callable[[Path], Path]]) -> Iterator[Trial]:
    def through_datasets(data: Path) -> list[Any]:
        return list(open_source(f"hf:{data}", "train").documents())

    def shard(content: bytes, name: str = "train.jsonl") -> Callable[[Path], Any]:
        def replace(data: Path) -> None:
            for path in data.rglob("*.txt"):
                path.unlink()
            (data / name).write_bytes(content)

        return replace

    sound = as_jsonl(ROWS)
    texts = [text for text, _ in ROWS]
    yield trial("hf: sound", made(shard(sound)), through_datasets, texts)
    yield trial("hf: a mark", made(shard(b"\xef\xbb\xbf" + sound)), through_datasets, texts)
    yield trial("hf: a mark, text", made(shard(b"\xef\xbb\xbfa\nb\n", "train.txt")), through_datasets, ["a", "b"])
    yield trial("hf: an unreadable subfolder", made(shard(sound)), partial(closed, through_datasets), message="closed")
    for name, content in {
        "cut short": sound[:-9], "no text": bytes(range(256)) * 9, "another column": as_jsonl(ROWS, ("body", "label")),
        "a number as text": as_jsonl([(3, "a")]), "no object": b"3\n",
    }.items():  # fmt: skip
        yield trial(f"hf: {name}", made(shard(content)), through_datasets, message="texts")
    wide = shard(sound.decode().encode("utf-16"))
    yield trial("hf: UTF-16", made(wide), through_datasets, message="train.jsonl: UTF-16 text")
    yield trial("hf: an empty folder", lambda folder: folder, through_datasets)


def _link(link: Path, target: Path) -> None:
    link.symlink_to(target)


def label_trials() -> Iterator[Trial]:
    """Labels that are missing, not finite, of several kinds, or too large."""
    sound = [(text, number % 2) for number, (text, _) in enumerate(ROWS)]
    for name, value in {
        "NaN": float("nan"), "infinity": float("inf"), "null": None, "empty": "", "text among numbers": "high",
        "a list": [1], "an object": {"a": 1}, "a fraction of 1e39": 1e39,
    }.items():  # fmt: skip
        content = as_jsonl([*sound[:20], ("one", value), *sound[20:]])
        yield trial(f"labels: {name}", named("a.jsonl", content), read_rows, message="a.jsonl, line")
    large = as_jsonl([("one", 0.5), ("two", 10**400)])
    yield trial("labels: a number of 400 digits", named("a.jsonl", large), read_rows, message="a.jsonl, line 2")
    yield trial(
        "labels: NaN in a CSV file", named("a.csv", b"text,label\na,1\nb,nan\nc,0\n"), read_rows, message="line 3"
    )
    one = named("a.jsonl", as_jsonl([(text, 1) for text, _ in ROWS]))
    yield trial("labels: one class", one, read_rows)
    yield trial("labels: classes", named("a.jsonl", as_jsonl(sound)), read_rows, sound)
    numbers = [(text, number / 2) for number, (text, _) in enumerate(ROWS)]
    yield trial("labels: numbers", named("a.jsonl", as_jsonl(numbers)), read_rows, numbers)
    short = as_jsonl(sound) + b'{"text": "no label"}\n'
    yield trial("labels: a row without", named("a.jsonl", short), read_rows, message="a.jsonl, line 41")


def token_trials() -> Iterator[Trial]:
    """Token ids outside the model, and indexed data whose two files contradict each other."""

    def packed(path: Path, spec: str = "{}", vocabulary: int = 257, tokenizer: str = "bytes") -> Any:
        cache = path.parent / "cache"
        source = open_source(spec.format(path), "all")
        made = load_tokenizer(tokenizer, lambda: iter(()), cache_dir=cache) if tokenizer else None
        data = pack(source, made, sequence_length=2, cache_dir=cache, model_vocab=vocabulary)
        return data.tokens.tolist()  # type: ignore[union-attr]

    text = named("a.txt", b"abc")
    yield trial("tokens: as many as the model has", text, packed, [*b"abc", 256])
    yield trial("tokens: one too many", text, partial(packed, vocabulary=256), message="token id 256")
    yield trial("tokens: no tokenizer", text, partial(packed, tokenizer=""), message="a.txt")
    yield trial("tokens: no such tokenizer", text, partial(packed, tokenizer="./none"), message="./none")
    read = partial(packed, spec="megatron:{}", tokenizer="", vocabulary=8)
    yield trial("megatron: sound", _indexed(), read, [1, 2, 3, 4, 5, 6])
    yield trial("megatron: an id without an embedding", _indexed(), partial(read, vocabulary=6), message="token id 6")
    for name, (suffix, change) in INDEXED.items():
        yield trial(f"megatron: {name}", _indexed(suffix, change), read, message="indexed")
    yield trial("megatron: no files", lambda folder: folder / "none", read)


def _indexed(suffix: str = "", change: Callable[[bytes], bytes] = bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        prefix = folder / "indexed"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for document in ([1, 2, 3, 4], [5, 6]):
            builder.add_document(torch.tensor(document), [len(document)])
        builder.finalize(f"{prefix}.idx")
        if suffix:
            path = Path(f"{prefix}.{suffix}")
            path.write_bytes(change(path.read_bytes()))
        return prefix

    return write


def config_trials() -> Iterator[Trial]:
    """Configurations of models, as a JSON file and in a folder."""
    sound = json.dumps(MODEL).encode()
    sizes = lambda path: load_config(path).hidden_size  # noqa: E731
    yield trial("model: sound", named("m.json", sound), sizes, 32)
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        yield trial(f"model: {encoding} with a mark", named("m.json", sound.decode().encode(encoding)), sizes, 32)
    in_folder = named("config.json", json.dumps({**MODEL, "model_type": "llama"}).encode("utf-8-sig"))
    yield trial("model: a mark in a folder", in_folder, lambda path: config_of_folder(path.parent).hidden_size, 32)
    for name, content in {
        "empty": b"", "cut short": sound[:-9], "a list": b"[1]", "no text": bytes(range(256)), "null": b"null",
        "nested too deeply": b"[" * 100_000, "a misspelt key": json.dumps({**MODEL, "rope_tetha": 1.0}).encode(),
        "a size as text": json.dumps({**MODEL, "hidden_size": "32"}).encode(),
        "an unknown rope": json.dumps({**MODEL, "rope_scaling": {"rope_type": "x", "factor": 2.0}}).encode(),
        "rope_scaling of another kind": json.dumps({**MODEL, "rope_scaling": 2.0}).encode(),
    }.items():  # fmt: skip
        yield trial(f"model: {name}", named("m.json", content), sizes)
    yield trial("model: missing", lambda folder: folder / "m.json", sizes)
