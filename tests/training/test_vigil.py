"""Signs of life: what a rank posts about its main thread, and when another one is called silent."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.distributed import HashStore

from ds_lowrank.training import vigil, whereabouts
from ds_lowrank.training.vigil import Vigil, key, read
from ds_lowrank.training.whereabouts import Observer, Sign, Stage, enter, main_stack, waits
from tests.engines.pool import run_ranks

SECONDS = 0.3


@pytest.fixture(autouse=True)
def stage(monkeypatch):
    monkeypatch.setattr(whereabouts, "_now", (Stage.SETUP, "the set-up"))
    monkeypatch.setattr(vigil, "SECONDS_BETWEEN_LOOKS", 0.02)


def seen_while(main):
    """What two looks from another thread see, the second one after half a second of ``main`` in this thread."""
    found, observer = [], Observer()

    def look():
        time.sleep(0.1)
        found.append(observer.look())
        time.sleep(0.5)
        found.append(observer.look())

    thread = threading.Thread(target=look)
    thread.start()
    main(thread)
    return found[1]


def test_a_look_tells_a_main_thread_that_works_from_one_that_does_nothing():
    def works(thread):
        while thread.is_alive():
            sum(range(1000))

    enter(Stage.STEP, "step 41, reading data")
    busy, idle = seen_while(works), seen_while(lambda thread: thread.join())
    assert busy.idle == 0
    assert 0.4 < idle.idle < 10 and 0.4 < idle.still < 10  # half a second, on a busy machine more
    assert (idle.stage, idle.text, idle.waits) == ("step", "step 41, reading data", False)


def test_a_main_thread_that_writes_is_not_idle(tmp_path):
    def writes(thread):
        with (tmp_path / "file").open("wb") as file:
            while thread.is_alive():
                file.write(bytes(2**16))
                file.seek(0)
                time.sleep(0.05)

    assert seen_while(writes).idle == 0


def _meets_rank_1_late():
    if distributed.get_rank() == 1:
        time.sleep(0.5)
        seen = waits(main_stack())
        distributed.all_reduce(torch.zeros(1))
        return seen
    found = []

    def look():
        time.sleep(0.2)
        found.append(waits(main_stack()))

    thread = threading.Thread(target=look)
    thread.start()
    distributed.all_reduce(torch.zeros(1))
    thread.join()
    return found[0]


def test_a_rank_in_a_collective_is_seen_waiting():
    assert run_ranks(2, _meets_rank_1_late) == [True, False]


def test_a_sign_is_read_as_it_was_posted():
    sign = Sign("files", "step 4, saving", "run.py:126, save", waits=False, still=2.5, idle=1.5)
    assert read(f"7\n{sign.dumps()}") == sign
    assert read("") is None
    assert str(sign) == "step 4, saving (run.py:126, save)"
    assert str(Sign("set-up", "the set-up")) == "the set-up"


def watched(store, post, seconds=3 * SECONDS):
    """What rank 1 has said of rank 0 in some seconds, in which rank 0 posts what ``post`` returns, if anything."""
    said = []
    watch = Vigil(1, 2, SECONDS, lambda *found: said.append(found))
    watch.start()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end and not said:
        number += 1
        if (sign := post(number)) is not None:
            store.set(key(0), f"{number}\n{sign.dumps()}")
        watch.tell(store)
        time.sleep(0.01)
    watch.end()
    return said


@pytest.mark.parametrize(
    ("sign", "silent"),
    [
        (Sign("files", "saving", idle=2 * SECONDS), True),
        (Sign("files", "saving", idle=SECONDS / 2), False),
        (Sign("files", "saving", idle=2 * SECONDS, waits=True), False),  # for the rank that saves
        (Sign("set-up", "the set-up", idle=2 * SECONDS), False),  # a download, a compiler, another process's lock
        (Sign("step", "step 5", idle=2 * SECONDS), False),  # which a collective ends
    ],
)
def test_a_rank_that_should_write_files_and_does_nothing_is_silent(sign, silent):
    assert watched(HashStore(), lambda number: sign) == ([(0, sign)] if silent else [])


def test_a_rank_whose_process_is_stopped_is_silent_at_every_stage():
    sign = Sign("set-up", "the set-up")
    assert watched(HashStore(), lambda number: sign if number < 3 else None, 20 * SECONDS) == [(0, sign)]
    assert watched(HashStore(), lambda number: None, 20 * SECONDS) == [(0, None)]


def test_a_store_that_does_not_answer_is_nobody_in_particular():
    said = []
    watch = Vigil(1, 2, SECONDS, lambda *found: said.append(found))
    watch.start()
    time.sleep(3 * SECONDS)
    assert said == [(None, None)]


def test_a_job_that_was_suspended_has_no_silent_rank(monkeypatch):
    """As by ``scontrol suspend``: all clocks go on, and all signs are old."""
    clock = [0.0]
    looks = iter([1.0, 5000.0, 5001.0])

    def sleep(seconds):
        clock[0] = next(looks, None)
        if clock[0] is None:
            raise SystemExit  # of the thread

    monkeypatch.setattr(vigil, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(vigil, "SECONDS_BETWEEN_LOOKS", 1.0)
    said = []
    watch = Vigil(1, 2, 300.0, lambda *found: said.append(found))
    with pytest.raises(SystemExit):
        watch._keep()
    assert not said
