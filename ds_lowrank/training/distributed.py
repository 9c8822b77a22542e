"""Starting and ending a job under ``deepspeed``, ``torchrun`` or as a single process."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import warnings
from typing import NoReturn

import deepspeed
import deepspeed.ops
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import set_log_level_from_string
from transformers.utils.logging import disable_progress_bar


def join() -> None:
    """Initialise ``torch.distributed`` from the launcher's environment or, without one, as a single process."""
    set_log_level_from_string(os.environ.get("DS_LOG_LEVEL", "warning"))
    _show_roles()
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # megatron-core warns in every module that it uses torch's kernels; the role table says so once.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    disable_progress_bar()  # shown when a file is written; it would interrupt the log
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # It takes half a minute to compile and leaves 66 MiB per rank in /dev/shm; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)


def _show_roles() -> None:
    """Print what the optimizer logs at the start: which parameters it projects, and how large their state is."""
    log = logging.getLogger("ds_lowrank")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler(sys.stdout)]


def leave() -> NoReturn:
    """End a finished job with exit code 0 once every rank is done. Collective.

    Ranks wait for each other, as with gloo one that leaves early aborts the others. Functions registered with
    ``atexit`` (such as a monitor's last upload) still run. The interpreter's own teardown is skipped: DeepSpeed keeps
    process groups alive until then, and gloo's threads occasionally abort it.
    """
    dist.barrier()
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    _end(0)


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def refuse(error: Exception) -> NoReturn:
    """End a job that cannot start or continue with exit code 1. Rank 0 prints the message.

    Args:
        error: the error; every rank must call this function.
    """
    if dist.get_rank() == 0:
        print(f"error: {error}", file=sys.stderr)
    _end(1)  # no teardown: with gloo, the last ranks would abort with messages of their own
