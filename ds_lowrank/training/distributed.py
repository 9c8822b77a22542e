"""Joining and leaving the job, under `deepspeed`, `torchrun` or as a single process."""

import atexit
import logging
import os
import socket
import sys
import warnings
from typing import NoReturn

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import set_log_level_from_string
from torch import distributed
from transformers.utils.logging import disable_progress_bar


def join() -> None:
    """Initialise `torch.distributed` from the launcher's environment, or alone where there is none."""
    set_log_level_from_string(os.environ.get("DS_LOG_LEVEL", "warning"))
    _show_roles()
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # megatron-core says in each of its modules that torch's own kernels are used; the role table says it once.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    disable_progress_bar()  # of a file being written, in the midst of the log
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # It compiles for half a minute on first use and leaves 66 MiB a rank in /dev/shm; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)


def _show_roles() -> None:
    """Print what the optimizer logs at start: which parameters it projects, and what their state costs."""
    log = logging.getLogger("ds_lowrank")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler(sys.stdout)]


def leave() -> NoReturn:
    """End a finished job, with exit code 0, once every rank is done: one that leaves early aborts the others in gloo.

    What registered itself for the end of the process (a monitor's last upload) still runs. The interpreter's teardown
    does not: DeepSpeed keeps process groups alive until then, and gloo's threads now and then abort it.
    """
    distributed.barrier()
    distributed.destroy_process_group()
    atexit._run_exitfuncs()
    _end(0)


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def refuse(error: Exception) -> NoReturn:
    """End a job that cannot start, with exit code 1 and the message said once, by rank 0."""
    if distributed.get_rank() == 0:
        print(f"error: {error}", file=sys.stderr)
    _end(1)  # no teardown: in gloo the last ranks to leave would abort with a message of their own
