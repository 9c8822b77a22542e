"""Trials of bad data in which the programs are started, on two ranks."""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults import programs
from benchmarks.faults.data_reading import ROWS, as_csv, as_jsonl
from benchmarks.faults.data_sets import MODEL
from benchmarks.faults.trial import Outcome, Trial

CONFIG = {
    "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2},
    "optimizer": {"type": "GaLore", "params": {"lr": 1e-2, "rank": 2}},
}  # fmt: skip
Write = Callable[[Path], object]


def starts() -> Iterator[Trial]:
    """Programs with data that they must refuse on both ranks in one line, or train on."""
    for name, program, data, more, write, message in (
        ("a damaged record", "pretrain", "a.jsonl", [], _bytes("a.jsonl", b'{"text": "a"}\n{'), "a.jsonl, line 2"),
        ("a damaged archive", "pretrain", "a.txt.gz", [], _bytes("a.txt.gz", b"none"), "a.txt.gz"),
        ("no data", "pretrain", "none", [], _bytes("x", b""), "no data at 'none'"),
        ("a pipe among the texts", "pretrain", "texts", [], _pipe, "b.txt"),
        ("an id too many", "pretrain", "a.txt", ["--model", "small.json"], _small, "token id 256"),
        ("NaN among labels", "finetune", "a.jsonl", [], _bytes("a.jsonl", as_jsonl(_with_nan())), "a.jsonl, line 21"),
        ("a column too few", "finetune", "a.csv", [], _bytes("a.csv", b"text,label\na\n"), "a.csv, line 2"),
        ("a mark before the columns", "finetune", "a.csv", [], _bytes("a.csv", BOM_UTF8 + as_csv(ROWS)), ""),
        ("nothing held out", "pretrain", "a.txt", ["--eval-sequences", "0"], _bytes("a.txt", b"some text\n" * 30), ""),
    ):  # fmt: skip
        run = partial(_start, program=program, data=data, more=more, write=write, message=message)
        yield Trial(f"start: {name}", run, compact=name in ("a damaged record", "nothing held out"))


def _start(folder: Path, *, program: str, data: str, more: list[str], write: Write, message: str) -> Outcome:
    """Start a program; without a message it must train, otherwise refuse with it."""
    folder = folder / "work"
    folder.mkdir()
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    (folder / "model.json").write_text(json.dumps(MODEL))
    write(folder)
    common = ["--deepspeed_config", "ds.json", "--steps", "1", "--output", "out", "--cache", "cache"]
    common += ["--tokenizer", "bytes", "--model", "model.json", "--data", data, "--save-interval", "0"]
    common += ["--sequence-length", "8"] if program == "pretrain" else ["--max-length", "32", "--validation", data]
    finished = programs.run(program, [*common, *more], 2, folder)
    outcome = finished.refusal()
    if not message:
        return Outcome("same result") if finished.succeeded else Outcome("other result", outcome.detail)
    if outcome.verdict == "refused" and message not in finished.err:
        return Outcome("no message", outcome.detail)
    return outcome


def _bytes(name: str, content: bytes) -> Write:
    return lambda folder: (folder / name).write_bytes(content)


def _pipe(folder: Path) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("text")
    os.mkfifo(folder / "texts" / "b.txt")


def _small(folder: Path) -> None:
    (folder / "a.txt").write_text("text " * 99)
    (folder / "small.json").write_text(json.dumps({**MODEL, "vocab_size": 256}))


def _with_nan() -> list[tuple[str, float]]:
    return [(text, float("nan") if number == 20 else number % 2) for number, (text, _) in enumerate(ROWS)]
