"""A program of ``launch/`` from its command line to its exit code."""

from __future__ import annotations

import signal
from argparse import Namespace
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfigError

from ds_lowrank.checkpoint.disk import is_full, is_of_a_write
from ds_lowrank.checkpoint.export import export
from ds_lowrank.collectives import RemoteError, raise_on_all_ranks
from ds_lowrank.data.errors import DataError
from ds_lowrank.errors import CheckpointError, ConfigError
from ds_lowrank.training import distributed
from ds_lowrank.training.console import OutputError, open_console
from ds_lowrank.training.folders import Folders
from ds_lowrank.training.health import BrokenRunError
from ds_lowrank.training.launcher import Launchers
from ds_lowrank.training.output import AlreadyFinishedError, write_results
from ds_lowrank.training.run import Run
from ds_lowrank.training.same_everywhere import facts
from ds_lowrank.training.time_limits import TimeLimits
from ds_lowrank.training.train import train
from ds_lowrank.training.whereabouts import Stage, enter

AT_START: tuple[type[Exception], ...] = (ValueError, OSError, OutputError, RemoteError, DeepSpeedConfigError)
LATER: tuple[type[Exception], ...] = (
    *(BrokenRunError, CheckpointError, ConfigError, DataError, OSError, OutputError, RemoteError),
)
"""Errors whose messages say what to change. At the start a ``ValueError`` is about a setting, later it is a bug."""


def run_script(arguments: Namespace, set_up: Callable[[Namespace], Run]) -> NoReturn:
    """Join the job, set up the run, train, export, write the results, and end the process.

    Whatever raises, on whichever rank, ends the process with one line and exit code 1.

    Args:
        arguments: the command line of the program.
        set_up: makes the run.
    """
    open_console()
    # Until training handles it, Ctrl-C ends the process, also where it waits for another rank in a collective.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launchers = Launchers()
    folders = Folders({"--output": arguments.output, "--save": arguments.save})
    expected, bulletin = AT_START, None
    limits = TimeLimits(arguments.timeout, arguments.setup_timeout)
    try:
        hosts = distributed.join(limits.setup_timeout, arguments.join_timeout, facts(arguments))
        bulletin = distributed.watch_others(limits, hosts)
        saves = arguments.save_interval > 0 or arguments.resume is not None
        folders.claim(hosts if saves else ())
        try:
            run = set_up(arguments)
        except AlreadyFinishedError as reason:
            if dist.get_rank() == 0:
                print(reason)
        else:
            limits.lengthen()
            expected = LATER
            if train(run, limits, launchers):
                limits.lengthen()
                enter(Stage.FILES, "the last step, writing the results")
                finish(run)
        folders.release()
        bulletin.close()
        distributed.leave()
    except Exception as error:
        folders.release()
        distributed.fail(error, expected, bulletin, limits)


def finish(run: Run) -> None:
    """Export the model if that is asked for, and write the plot and the summary. Collective.

    Args:
        run: a run after its last step.

    Raises:
        OutputError: something cannot be written; says how to write it later.
        RemoteError: another rank failed.
    """
    arguments = run.arguments
    if arguments.export:
        folder = arguments.output / "export"
        try:
            export(run.engine, run.tokenizer, folder)
        except Exception as error:
            if not is_of_a_write(error):
                raise
            raise OutputError(_unwritten(run, f"{folder} was not exported", error)) from error
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            try:
                write_results(arguments.output, run.steps, run.facts())
            except OSError as error:
                what = f"the plot and the summary were not written to {arguments.output}"
                raise OutputError(_unwritten(run, what, error)) from error


def _unwritten(run: Run, what: str, error: Exception) -> str:
    first = "make room" if is_full(error) else "mend that"
    if run.arguments.save_interval:
        later = "run the same command with --resume: it only writes what is missing"
    else:
        later = "train again, with --save-interval, so that the last step is saved"
    return f"{what}: {error}; {first}, and {later}"
