"""Ranks that Open MPI's ``mpirun`` starts, also for ``deepspeed --launcher openmpi``.

It numbers its tasks in variables of its own. Here they become those that torch and DeepSpeed read. DeepSpeed's own way
asks MPI, for which it needs mpi4py built for the same MPI.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

from ds_lowrank.errors import ConfigError

RANK, LOCAL_RANK, RANKS, LOCAL_RANKS = (
    f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")
)


def adopt(environment: MutableMapping[str, str]) -> None:
    """Set RANK and the other variables of a rank, where Open MPI started several tasks and nothing else set them.

    ``MASTER_PORT`` is DeepSpeed's default if it is not set. So is ``MASTER_ADDR`` where all tasks are on this node.

    Args:
        environment: the environment variables of the process; changed in place.

    Raises:
        ConfigError: the tasks are on several nodes, and MASTER_ADDR is not set.
    """
    told = all(name in environment for name in (RANK, LOCAL_RANK, RANKS))
    if "RANK" in environment or not told or environment[RANKS] == "1":
        return
    if environment.get(LOCAL_RANKS) == environment[RANKS]:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_ADDR" not in environment:
        raise ConfigError(
            f"mpirun started {environment[RANKS]} tasks on several nodes, which do not know where rank 0 is: give "
            "mpirun -x MASTER_ADDR=HOST, or deepspeed a line MASTER_ADDR=HOST in ~/.deepspeed_env, where HOST is the "
            "first host of the hostfile"
        )
    environment.setdefault("MASTER_PORT", str(TORCH_DISTRIBUTED_DEFAULT_PORT))
    environment["RANK"] = environment[RANK]
    environment["LOCAL_RANK"] = environment[LOCAL_RANK]
    environment["WORLD_SIZE"] = environment[RANKS]
