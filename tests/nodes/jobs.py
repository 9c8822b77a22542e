"""Small trainings over both nodes of a cluster, by every launcher."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.nodes.cluster import INTERFACE, ROOT, Cluster, Finished, Running
from tests.training.runs import SCRIPT, Workspace, deepspeed_config
from tests.training.test_launch_grids import EVALUATE

BIN = Path(sys.executable).parent
VARIABLES = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
NODES = ("node1", "node2")
SECONDS = 240.0
"""Until a job counts as hanging. It takes twenty to fifty on two idle cores."""

Start = Callable[[Cluster, int, list[str]], list[Running]]
"""Starts a training on both nodes, with some ranks on each; returns one command, or one for each node."""


def deepspeed(cluster: Cluster, ranks: int, arguments: list[str], names: Sequence[str] = NODES) -> list[Running]:
    """``deepspeed --hostfile``, which starts the nodes by pdsh and ssh."""
    cluster.set_environment(**VARIABLES)
    hostfile = cluster.hostfile(ranks, *names)
    command = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--master_addr", cluster.nodes[0].address]
    return [cluster.nodes[0].start([*command, str(SCRIPT), *arguments], PYTHONPATH=str(ROOT))]


def deepspeed_openmpi(cluster: Cluster, ranks: int, arguments: list[str]) -> list[Running]:
    """``deepspeed --hostfile --launcher openmpi``, which does not say where rank 0 is."""
    more = f"--allow-run-as-root --bind-to none --mca btl_tcp_if_include {INTERFACE}"
    cluster.set_environment(**VARIABLES, MASTER_ADDR="node1")
    hostfile = cluster.hostfile(ranks, *NODES)
    command = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--launcher", "openmpi", "--launcher_args", more]
    return [cluster.nodes[0].start([*command, str(SCRIPT), *arguments], PYTHONPATH=str(ROOT))]


def mpirun(cluster: Cluster, ranks: int, arguments: list[str]) -> list[Running]:
    """``mpirun`` alone."""
    hostfile = cluster.hostfile(ranks, *NODES)
    variables = {**VARIABLES, "MASTER_ADDR": "node1"}
    exports = [word for name in variables for word in ("-x", name)]
    command = ["mpirun", "--allow-run-as-root", "-n", str(2 * ranks), "--hostfile", str(hostfile), "--bind-to", "none"]
    program = [sys.executable, str(SCRIPT), *arguments]
    return [cluster.nodes[0].start([*command, *exports, *program], **variables)]


def torchrun(cluster: Cluster, ranks: int, arguments: list[str], **variables: str) -> list[Running]:
    """``torchrun`` on each node."""
    command = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"{cluster.nodes[0].address}:29400", str(SCRIPT)]
    return [node.start([*command, *arguments], **VARIABLES, **variables) for node in cluster.nodes]


LAUNCHERS: dict[str, Start] = {
    "deepspeed --hostfile": deepspeed,
    "deepspeed --launcher openmpi": deepspeed_openmpi,
    "mpirun": mpirun,
    "torchrun": torchrun,
}
GRIDS: dict[str, tuple[int, list[str]]] = {
    "ZeRO 2": (1, []),
    "ZeRO 2, tensor 2 x data 2": (2, ["--tensor-parallel", "2"]),
}
"""Ranks on each node, and what the command line has more. Tensor-parallel ranks are on one node."""


class Trainings:
    """The trainings of one cluster, in its shared folder."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.workspace = Workspace.make(cluster.shared)

    def arguments(self, output: str, *more: str, steps: int = 6) -> list[str]:
        """A command line of launch/pretrain.py."""
        return [*self.workspace.arguments(output, steps=steps, config=deepspeed_config()), *EVALUATE, *more]

    def alone(self, output: str) -> Running:
        """Start the training as one process."""
        command = [sys.executable, str(SCRIPT), *self.arguments(output)]
        return self.cluster.nodes[0].start(command, **VARIABLES)

    def metrics(self, output: str) -> Mapping[int, dict[str, Any]]:
        """The records of a run by step."""
        return self.workspace.metrics(output)


def finish(commands: list[Running], seconds: float = SECONDS) -> list[Finished]:
    """Wait for all commands of a job."""
    return [command.finish(seconds) for command in commands]


def succeed(commands: list[Running]) -> float:
    """Wait for a job that must succeed; return its seconds."""
    done = finish(commands)
    assert not any(one.code for one in done) and all(one.code is not None for one in done), done
    return max(one.seconds for one in done)
