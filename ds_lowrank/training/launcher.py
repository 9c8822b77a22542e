"""What started this process: tasks of a cluster that are no ranks, and launchers that may end before it does."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping

import psutil
from deepspeed.utils.logging import log_levels

from ds_lowrank.errors import ConfigError

TASKS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
}
"""Where a cluster's starter says how many tasks it started; the first variable that is set counts."""

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

LAUNCHERS = {
    "deepspeed": ("deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    "torchrun": ("torch.distributed.run", "torch.distributed.launch"),
    "accelerate": ("accelerate.commands.launch",),
}
"""Launchers are scripts of these names, or Python modules."""

SECONDS_BETWEEN_LOOKS = 1.0


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse what would train a whole model in every task, or wait for ranks that nobody starts.

    Args:
        environment: the environment variables of the process.

    Raises:
        ConfigError: this is one of several tasks without a rank, some of a rank's variables are missing or no numbers
            that make sense, or DeepSpeed has no such log level.
    """
    level = environment.get("DS_LOG_LEVEL", "warning")
    if level.lower() not in log_levels:
        raise ConfigError(f"the environment variable DS_LOG_LEVEL is {level!r}: it must be {', '.join(log_levels)}")
    missing = [name for name in RANK_VARIABLES if name not in environment]
    if "RANK" in environment and missing:
        raise ConfigError(f"RANK is set but not {', '.join(missing)}: start with deepspeed or torchrun, or set all")
    if "RANK" in environment:
        _check_numbers(environment)
        return
    for starter, variables in TASKS.items():
        tasks = next((environment[name] for name in variables if name in environment), "1")
        # A shell of salloc has the number of tasks but is none itself.
        is_task = starter != "srun" or "SLURM_PROCID" in environment
        if is_task and tasks.isdigit() and int(tasks) > 1:
            raise ConfigError(
                f"this is one of {tasks} tasks of {starter} and RANK is not set, so each would train a model of its "
                "own: start one task per node that runs torchrun, or export RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR "
                "and MASTER_PORT in every task; for a single process, start one task"
            )


def _check_numbers(environment: Mapping[str, str]) -> None:
    """Refuse ranks that cannot be: torch would raise without their name, or wait for ranks that do not exist."""
    limits = {"WORLD_SIZE": 2**31, "MASTER_PORT": 2**16, "LOCAL_RANK": 2**31, "RANK": 2**31}
    for name, limit in limits.items():
        least = 1 if name in ("WORLD_SIZE", "MASTER_PORT") else 0
        text = environment[name]
        if not re.fullmatch(r"\d{1,10}", text.strip(), re.ASCII) or not least <= int(text) < limit:
            raise ConfigError(
                f"the environment variable {name} is {text!r}: it must be a whole number of at least {least}"
                + (" and at most 65535" if name == "MASTER_PORT" else "")
            )
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise ConfigError(
            f"the environment variable RANK is {environment['RANK']}, but WORLD_SIZE is {environment['WORLD_SIZE']}: "
            "ranks are numbered from 0 to WORLD_SIZE - 1"
        )


class Launchers:
    """The launchers (``deepspeed``, ``torchrun``) above this process, whose end it does not otherwise notice.

    ``deepspeed`` is two processes on one node. SIGTERM ends the upper one, and the lower one and the ranks live on.
    """

    def __init__(self) -> None:
        self._alive = [(name, parent) for parent in _parents() if (name := _launcher(parent))]
        self._lost: str | None = None
        self._next_look = 0.0

    def lost(self) -> str | None:
        """The name of a launcher that has ended since the start; None if all are alive, or there was none."""
        now = time.monotonic()
        if self._lost is None and now >= self._next_look:
            self._next_look = now + SECONDS_BETWEEN_LOOKS
            self._lost = next((name for name, parent in self._alive if not _runs(parent)), None)
        return self._lost


def _parents() -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process().parents()
    except psutil.Error:  # processes of other users are hidden here, and with them their ends
        return []
    return found


def _launcher(process: psutil.Process) -> str | None:
    """The launcher's name if a process is one. Its own flags and the user's script follow the first words."""
    try:
        words = process.cmdline()[:4]
    except psutil.Error:
        return None
    for name, modules in LAUNCHERS.items():
        files = tuple(f"/{module.replace('.', '/')}.py" for module in modules)
        if any(os.path.basename(word) == name or word in modules or word.endswith(files) for word in words):
            return name
    return None


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
