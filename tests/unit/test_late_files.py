"""A checkpoint is completed once rank 0 sees the files of all ranks, which a network file system may show late."""

from __future__ import annotations

import threading
import time

import pytest

from ds_lowrank.checkpoint import folder
from ds_lowrank.checkpoint.folder import complete, partial_of, prepare
from ds_lowrank.checkpoint.manifest import Progress, Sealed, read_manifest, seal
from ds_lowrank.errors import CheckpointError

NAMES = ["rank_00000.safetensors", "rank_00001.safetensors"]


def begun(directory):
    """A checkpoint whose second file is seen empty: what two ranks say about it, and how it becomes whole."""
    prepare(directory, "global_step1")
    inside = partial_of(directory, "global_step1") / "global_step1"
    (inside / NAMES[0]).write_bytes(b"first")
    whole = directory / "whole"
    whole.write_bytes(b"second")
    written: dict[str, Sealed | None] = {NAMES[0]: seal(inside / NAMES[0]), NAMES[1]: seal(whole)}
    whole.unlink()
    (inside / NAMES[1]).write_bytes(b"")
    return written, lambda: (inside / NAMES[1]).write_bytes(b"second")


def test_files_that_are_seen_late_are_waited_for(tmp_path):
    written, show = begun(tmp_path)
    threading.Timer(0.2, show).start()
    started = time.monotonic()
    complete(tmp_path, "global_step1", {}, Progress(1), written, NAMES)
    assert time.monotonic() - started >= 0.2
    assert set(read_manifest(tmp_path / "global_step1").files) == set(NAMES)


def test_files_that_never_come_are_named(tmp_path, monkeypatch):
    written, _ = begun(tmp_path)
    monkeypatch.setattr(folder, "LATE_SECONDS", 0.1)
    with pytest.raises(CheckpointError, match="is not there, or shorter than its rank wrote it"):
        complete(tmp_path, "global_step1", {}, Progress(1), written, NAMES)
    assert not (tmp_path / "global_step1").exists()


def test_a_checkpoint_with_a_file_of_somebody_else_is_not_replaced(tmp_path):
    written, show = begun(tmp_path)
    show()
    complete(tmp_path, "global_step1", {}, Progress(1), written, NAMES)
    prepare(tmp_path, "global_step1", replaces=True)
    (tmp_path / "global_step1" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="with files that were not saved with it, and is not overwritten"):
        prepare(tmp_path, "global_step1", replaces=True)
    assert (tmp_path / "global_step1" / "notes.txt").read_text() == "mine"
