"""Standard streams that are closed, full or a pipe without a reader; paths that are not text."""

import errno
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from ds_lowrank.finetuning.best import Best
from ds_lowrank.training.console import ConsoleError, ConsoleHandler, OutputError, explained, open_console
from ds_lowrank.training.failures import Failure, Kind
from ds_lowrank.training.output import record_save, saved_in
from ds_lowrank.training.script import _unwritten


def test_files_do_not_get_the_descriptors_of_closed_streams(tmp_path):
    child = os.fork()
    if child == 0:
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        sys.stdin = sys.stdout = sys.stderr = None  # as the interpreter has it after a start like this
        open_console()
        with (tmp_path / "file").open("w") as file:
            print("text", flush=True)
            os.write(2, b"an error")
            file.write(str(file.fileno()))
        os._exit(sys.stderr.isatty() or sys.stdin.read() != "")
    assert os.waitpid(child, 0)[1] == 0
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EPIPE, "its reader has ended"),
        (errno.EDQUOT, "make room, and continue"),
        (errno.EISDIR, "mend that, and continue"),
    ],
)
def test_what_to_do_depends_on_why_it_cannot_be_written(number, advice):
    with pytest.raises(ConsoleError, match=f"^the console output cannot be written: .*; {advice}"), explained():
        raise OSError(number, os.strerror(number))
    with (
        pytest.raises(OutputError, match=rf"^run/x cannot be written: .*; {advice}") as found,
        explained(Path("run/x")),
    ):
        raise OSError(number, os.strerror(number))
    assert not isinstance(found.value, ConsoleError)


@pytest.mark.parametrize("kind", [SafetensorError, Exception])  # of safetensors, of tokenizers
def test_a_best_model_that_does_not_fit_on_the_disk_is_said_in_one_line(tmp_path, monkeypatch, kind):
    def fail(*_):
        raise kind("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("ds_lowrank.finetuning.best.export", fail)
    kept = Best(None, None, tmp_path, "accuracy")
    with pytest.raises(OutputError, match=r"best cannot be written: .*device.*; make room, and continue"):
        kept.consider(3, 0.5)


def test_room_is_asked_for_where_it_is_missing():
    run = SimpleNamespace(arguments=SimpleNamespace(save_interval=5))
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "; make room, and run the same command" in _unwritten(run, "export", full)
    assert "; mend that, and run the same command" in _unwritten(run, "export", IsADirectoryError(errno.EISDIR, "x"))


def test_a_log_line_without_a_reader_is_no_traceback(monkeypatch, capsys):
    def fail(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", SimpleNamespace(write=fail, flush=fail))
        ConsoleHandler().emit(logging.LogRecord("x", logging.INFO, "", 0, "text", None, None))
    ConsoleHandler().emit(logging.LogRecord("x", logging.INFO, "", 0, "%d", ("no number",), None))
    captured = capsys.readouterr()
    assert captured.err.count("--- Logging error ---") == 1


@pytest.mark.parametrize("name", ["ends with a blank ", "ends with a line\n", os.fsdecode(b"not UTF-8 \xff")])
@pytest.mark.parametrize("inside", [True, False])
def test_a_run_finds_its_checkpoints_whatever_their_folder_is_called(tmp_path, name, inside):
    output, save = tmp_path / "run", tmp_path / ("run" if inside else "") / name
    output.mkdir()
    save.mkdir()
    record_save(output, save)
    assert saved_in(output) == save.resolve()


def test_an_error_about_a_path_that_is_no_text_can_be_sent_and_printed():
    failure = Failure.of(ValueError(f"{os.fsdecode(b'run-' + bytes([255]))} is not a folder"), (ValueError,))
    assert failure == Failure(Kind.OWN, r"run-\udcff is not a folder")
