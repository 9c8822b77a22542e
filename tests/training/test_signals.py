"""Being asked to stop, and being asked again; launchers that end; tasks that are no ranks."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import torch

from ds_lowrank.collectives import any_rank
from ds_lowrank.errors import ConfigError
from ds_lowrank.training import launcher
from ds_lowrank.training.interrupt import StopRequest
from ds_lowrank.training.launcher import Launchers, check_environment
from ds_lowrank.training.mpirun import adopt
from tests.engines.pool import run_ranks


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _signalled(rank_asked):
    from torch import distributed

    stop, device = StopRequest(), torch.device("cpu")
    before = any_rank(stop.received, device=device)
    if distributed.get_rank() == rank_asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher repeats it
        wait_for(lambda: stop.received)
    return before, any_rank(stop.received, device=device)


@pytest.mark.parametrize("rank_asked", [None, 0, 1])
def test_a_signal_to_one_rank_stops_both(rank_asked):
    assert run_ranks(2, _signalled, rank_asked) == [([False], [rank_asked is not None])] * 2


def _waits_for_a_rank_that_does_not_come():
    from torch import distributed

    if distributed.get_rank() == 1:
        time.sleep(600)
    StopRequest()
    distributed.all_reduce(torch.zeros(1))  # in C++, where no Python handler runs


def _impatient(number):
    parent = os.getpid()
    child = os.fork()
    if child == 0:  # signals its parent, which waits in a collective
        time.sleep(0.5)
        os.kill(parent, number)
        time.sleep(1.2)
        with suppress(ProcessLookupError):  # of rank 1, which the first signal ends
            os.kill(parent, number)
        os._exit(0)
    _waits_for_a_rank_that_does_not_come()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_that_waits_in_a_collective(number):
    started = time.monotonic()
    with pytest.raises(AssertionError, match="died without an answer"):  # which a process that goes on gives
        run_ranks(2, _impatient, number, timeout=60)
    assert time.monotonic() - started < 30


def _impatient_while_a_thread_writes(number, folder):
    def write():
        with (folder / "file").open("wb") as file:
            while True:  # as a checkpoint that is written in the background; it never ends
                file.seek(0)
                file.write(bytes(2**24))
                os.fsync(file.fileno())

    threading.Thread(target=write).start()  # no daemon: the end of the interpreter would wait for it
    wait_for((folder / "file").exists)
    _impatient(number)


def test_a_second_signal_does_not_wait_for_a_checkpoint_that_a_thread_writes(tmp_path):
    started = time.monotonic()
    with pytest.raises(AssertionError, match="died without an answer"):
        run_ranks(2, _impatient_while_a_thread_writes, signal.SIGTERM, tmp_path, timeout=60)
    assert time.monotonic() - started < 30


def _asked_without_a_console():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(lambda: stop.received)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
    os._exit(0)


def test_signals_are_heard_when_the_console_is_gone():
    assert run_ranks(1, _asked_without_a_console) == [128 + signal.SIGTERM]


def _forks():
    stop = StopRequest()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    time.sleep(0.1)
    return os.WTERMSIG(status), stop.received


def test_a_signal_to_a_forked_helper_ends_the_helper_and_is_no_request():
    assert run_ranks(1, _forks) == [(signal.SIGTERM, False)]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["/usr/bin/python3", "/opt/venv/bin/deepspeed", "--num_gpus", "2", "x.py"], "deepspeed"),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="], "deepspeed"),
        (["python", "/lib/deepspeed/launcher/runner.py", "x.py"], "deepspeed"),
        (["python", "-m", "torch.distributed.run", "--standalone"], "torchrun"),
        (["/opt/venv/bin/torchrun", "--standalone", "x.py"], "torchrun"),
        (["bash", "-c", "deepspeed x.py"], None),
        (["bash", "/home/me/deepspeed_jobs/run.sh"], None),
        (["tmux", "new", "-d"], None),
        (["python", "launch/pretrain.py", "--deepspeed_config", "torchrun/x.json", "deepspeed"], None),
        ([], None),
    ],
)
def test_a_launcher_is_recognised_by_its_own_words(words, name):
    class Process:
        def cmdline(self):
            return words

    assert launcher._launcher(Process()) == name


def test_the_end_of_a_launcher_is_noticed_and_that_of_a_shell_is_not(monkeypatch):
    helper = [sys.executable, "-c", "import time; time.sleep(60)"]
    parents = [subprocess.Popen(helper) for _ in range(2)]
    processes = [psutil.Process(parent.pid) for parent in parents]
    monkeypatch.setattr(psutil.Process, "parents", lambda self: processes)
    monkeypatch.setattr(launcher, "_launcher", lambda process: "deepspeed" if process is processes[0] else None)
    monkeypatch.setattr(launcher, "SECONDS_BETWEEN_LOOKS", 0.0)
    launchers = Launchers()
    assert launchers.lost() is None
    parents[1].kill()
    parents[1].wait()
    assert launchers.lost() is None
    parents[0].kill()  # a zombie from here on, as in a container without an init
    wait_for(lambda: launchers.lost() == "deepspeed")
    parents[0].wait()
    assert launchers.lost() == "deepspeed"


RANK_OF_TWO = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({}, None),
        (RANK_OF_TWO | {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "one of 4 tasks of srun and RANK is not set"),
        ({"SLURM_NTASKS": "4"}, None),  # a shell of salloc
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "one of 2 tasks of mpirun and RANK is not set"),
        ({"PMI_SIZE": "8"}, "start one task per node that runs torchrun, or export RANK, LOCAL_RANK"),
        ({"PMI_SIZE": "1"}, None),
        ({"DS_LOG_LEVEL": "INFO"}, None),
        ({"DS_LOG_LEVEL": "loud"}, "DS_LOG_LEVEL is 'loud': it must be debug, info, warning, error, critical"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (RANK_OF_TWO | {"RANK": "abc"}, "variable RANK is 'abc': it must be a whole number of at least 0"),
        (RANK_OF_TWO | {"RANK": "-1"}, "RANK is '-1'"),
        (RANK_OF_TWO | {"RANK": ""}, "RANK is ''"),
        (RANK_OF_TWO | {"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2: ranks are numbered from 0"),
        (RANK_OF_TWO | {"LOCAL_RANK": "1.0"}, "LOCAL_RANK is '1.0'"),
        (RANK_OF_TWO | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0': it must be a whole number of at least 1"),
        (RANK_OF_TWO | {"MASTER_PORT": "99999"}, "MASTER_PORT is '99999': .* at least 1 and at most 65535"),
    ],
)
def test_several_tasks_without_ranks_are_refused(environment, refused):
    if refused is None:
        check_environment(environment)
    else:
        with pytest.raises(ConfigError, match=refused):
            check_environment(environment)


def open_mpi(rank, local, size, local_size, **more):
    values = {"RANK": rank, "LOCAL_RANK": local, "SIZE": size, "LOCAL_SIZE": local_size}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()} | more


def rank_of(environment):
    adopt(environment)
    check_environment(environment)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return tuple(environment.get(name) for name in names)


def test_tasks_of_open_mpi_become_ranks():
    assert rank_of(open_mpi(3, 1, 4, 2, MASTER_ADDR="node1")) == ("3", "1", "4", "node1", "29500")
    assert rank_of(open_mpi(1, 1, 2, 2, MASTER_PORT="4711")) == ("1", "1", "2", "127.0.0.1", "4711")
    assert rank_of(open_mpi(0, 0, 1, 1)) == (None,) * 5  # one process
    assert rank_of(open_mpi(1, 0, 2, 1) | RANK_OF_TWO)[:3] == ("1", "1", "2")  # torchrun under mpirun
    with pytest.raises(ConfigError, match=r"4 tasks on several nodes, .* -x MASTER_ADDR=HOST, or deepspeed a line"):
        rank_of(open_mpi(3, 1, 4, 2))
