"""The folders of a run: tried at the start, and locked against a second run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading

import pytest
import torch.distributed as dist

from ds_lowrank.training import lock, shared
from ds_lowrank.training.folders import Folders
from ds_lowrank.training.lock import Lock
from tests.engines.pool import run_ranks


def folders(output, save=None):
    return Folders({"--output": output, "--save": output / "checkpoints" if save is None else save})


def test_a_second_run_is_refused_and_told_who_the_first_is(tmp_path):
    first = folders(tmp_path / "run")
    first.claim()
    for second in (folders(tmp_path / "run"), folders(tmp_path / "other", tmp_path / "run" / "checkpoints")):
        with pytest.raises(
            ValueError, match=rf"run.* is in use by another run \(process {os.getpid()} on .*: wait until"
        ):
            second.claim()
    assert not (tmp_path / "other").exists()
    first.release()
    assert not (tmp_path / "run").exists()  # nothing was written
    third = folders(tmp_path / "run", tmp_path / "run")  # one folder for both
    third.claim()
    third.release()


def test_what_a_run_has_written_stays(tmp_path):
    claimed = folders(tmp_path / "run")
    claimed.claim()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    claimed.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_killed_run_leaves_no_lock(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        Lock(tmp_path)
        os.write(writer, b"held")
        signal.pause()
    assert os.read(reader, 4) == b"held"
    with pytest.raises(BlockingIOError, match=f"process {child} on"):
        Lock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    Lock(tmp_path).release()
    assert not (tmp_path / ".lock").exists()


def test_the_lock_of_another_program_is_left_alone_and_what_a_crash_left_of_ours_is_not(tmp_path):
    path = tmp_path / ".lock"
    path.write_text("4711\n")
    with pytest.raises(
        ValueError, match=r"--output .*cannot be written \(.*\.lock is in the way: this program did not"
    ):
        folders(tmp_path).claim()
    assert path.read_text() == "4711\n"
    for ours in (b"", b"\0" * 80, b'{"host": "no'):
        path.write_bytes(ours)
        Lock(tmp_path).release()
        assert not path.exists()


@pytest.mark.parametrize("locks_work", [True, False])
@pytest.mark.parametrize("alive", [True, False])
def test_the_lock_of_another_host_is_watched_for_a_sign_of_life(tmp_path, monkeypatch, alive, locks_work):
    """A kernel on another host may not know the lock; a run that was killed there must not block this one for ever."""
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    if not locks_work:

        def unsupported(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", unsupported)
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "node17", "process": 4711, "since": "yesterday"}))
    done = threading.Event()

    def beat():
        while not done.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    if alive:
        thread.start()
        with pytest.raises(BlockingIOError, match=r"process 4711 on node17, since yesterday"):
            Lock(tmp_path)
        done.set()
        thread.join()
    else:
        Lock(tmp_path).release()


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    held = Lock(tmp_path)
    os.utime(tmp_path / ".lock", (0, 0))
    for _ in range(500):
        if (tmp_path / ".lock").stat().st_mtime > 0:
            break
        threading.Event().wait(0.01)
    else:
        raise AssertionError("the file of the lock was not touched")
    held.release()


def in_the_way(path):
    path.write_text("")


def dangling(path):
    path.symlink_to(path.with_name("absent"))


def looping(path):
    path.symlink_to(path)


def below_a_file(path):
    path.parent.rmdir()
    path.parent.write_text("")


def on_a_full_disk(path):
    path.mkdir()
    (path / ".lock").symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (in_the_way, "it is not a folder"),
        (dangling, "it is a link to nothing"),
        (looping, "it is a link to nothing"),
        (below_a_file, "Not a directory"),
        (on_a_full_disk, "No space left on device"),
    ],
)
@pytest.mark.parametrize("flag", ["--output", "--save"])
def test_a_folder_that_cannot_be_written_is_named_at_the_start(tmp_path, prepare, reason, flag):
    bad, good = tmp_path / "parent" / "bad", tmp_path / "good"
    bad.parent.mkdir()
    prepare(bad)
    claimed = folders(bad, good) if flag == "--output" else folders(good, bad)
    with pytest.raises(ValueError, match=rf"{flag} .*bad cannot be written \({reason}\): give a folder"):
        claimed.claim()
    assert not good.exists()


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ValueError, match=r"--output .* cannot be written \(Permission denied\)"):
        folders(tmp_path).claim()


NODES = ("node1", "node1", "node2")


def _claims(base, sees):
    """Claim a folder on three ranks. Rank 2 is on a node of its own, on which the path may lead elsewhere."""
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank % 2)
    shared.LATE_SECONDS = 0.5
    path = base / "path" if rank < 2 or sees else base / "elsewhere"
    claimed = Folders({"--save": path})
    try:
        claimed.claim(NODES)
    except ValueError as error:
        return str(error).replace(str(path), "PATH")
    dist.barrier()  # rank 0 has removed what it tried with
    left = sorted(entry.name for entry in path.iterdir())
    dist.barrier()
    claimed.release()
    return left


def test_a_folder_that_all_nodes_share_is_taken_and_one_that_they_do_not_is_refused_on_every_rank(tmp_path):
    assert run_ranks(3, _claims, tmp_path, True) == [[".lock"]] * 3
    first, *others = run_ranks(3, _claims, tmp_path, False)
    assert others == [first, first]
    assert first.startswith(
        "--save PATH is not one folder for all nodes: node2 does not see what rank 0 wrote there. Give a folder"
    )
    assert list(tmp_path.iterdir()) == []  # nothing is left of the tried folder
