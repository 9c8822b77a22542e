"""Two containers as two nodes: each in a network namespace of its own, with sshd, and keys that are mounted."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.container.buildah import Container
from tests.container.checks import QUICK_START, RUNS, folder_for, losses, wait_for
from tests.container.phases import TrialError, execute, expect

ADDRESSES = ("10.78.113.1", "10.78.113.2")
DEVICE = "v0"
PORT = 2222
SSH = "/home/trainer/.ssh"
ODD = 'a "b" \\c'
"""A value that must survive the way through sshd's configuration."""
VARIABLES = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "ODD": ODD}
MPIRUN = (
    *("mpirun", "--host", ",".join(f"{address}:1" for address in ADDRESSES), "-np", "2"),
    *("--mca", "btl_tcp_if_include", DEVICE, "--mca", "oob_tcp_if_include", DEVICE, "hostname", "-I"),
)
"""Each rank says its address."""


@dataclass(frozen=True)
class Node:
    """A container in a network namespace."""

    namespace: str
    address: str
    container: Container
    mounts: dict[Path, str]

    def command(self, *words: str) -> list[str]:
        """The command that runs a command there."""
        inside = self.container.command(words, mounts=self.mounts, **VARIABLES)
        return ["ip", "netns", "exec", self.namespace, *inside]

    def listens(self) -> bool:
        """Whether its sshd answers."""
        code = f"import socket; socket.create_connection(({self.address!r}, {PORT}), 1).close()"
        asked = ["ip", "netns", "exec", self.namespace, "python3", "-c", code]
        return subprocess.run(asked, stderr=subprocess.DEVNULL).returncode == 0

    def end(self) -> None:
        """End what runs in the namespace, and remove it."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], text=True, stdout=subprocess.PIPE).stdout
        for pid in listed.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", self.namespace], stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def connected(nodes: list[Node]) -> Iterator[None]:
    """Their network namespaces, with a wire between the two."""
    try:
        for node in nodes:
            execute(["ip", "netns", "add", node.namespace])
        ends = [(DEVICE, "netns", node.namespace) for node in nodes]
        execute(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]])
        for node in nodes:
            execute(["ip", "-n", node.namespace, "address", "add", f"{node.address}/24", "dev", DEVICE])
            for device in ("lo", DEVICE):
                execute(["ip", "-n", node.namespace, "link", "set", device, "up"])
        yield
    finally:
        for node in nodes:
            node.end()


def keys(work: Path) -> Path:
    """A folder with a new key pair that may log in, for the home folder of both containers."""
    folder = folder_for(work, "ssh")
    execute(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "id_ed25519"])
    shutil.copy(folder / "id_ed25519.pub", folder / "authorized_keys")
    for path in folder.iterdir():
        os.chown(path, 1000, 1000)
    return folder


def two_nodes(image: Container, work: Path) -> str:
    """Train on both by ``deepspeed --hostfile`` in one; ssh and mpirun reach the other as well."""
    runs = folder_for(work, "nodes")
    (runs / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    mounts = {runs: RUNS, keys(work): f"{SSH}:ro"}
    nodes = [
        Node(f"image{os.getpid()}-{number}", address, Container(image.buildah, image.image), mounts)
        for number, address in enumerate(ADDRESSES)
    ]
    # Another container of the first node: buildah cannot run two commands in one.
    launcher = replace(nodes[0], container=Container(image.buildah, image.image))
    log = work / "sshd.log"
    with connected(nodes), log.open("w") as output:
        for node in nodes:
            subprocess.Popen(node.command("sshd"), stdout=output, stderr=subprocess.STDOUT)
            wait_for(node.listens, 60, f"sshd at {node.address}")
        try:
            words = ("deepspeed", "--hostfile", "runs/hostfile", *QUICK_START[3:])
            trained = execute(launcher.command(*words), timeout=600)
            by_mpi = execute(launcher.command(*MPIRUN), timeout=60)
            there = execute(launcher.command("ssh", ADDRESSES[1], "printenv ODD; command -v deepspeed"), timeout=60)
        except TrialError as error:
            raise TrialError(f"{error}\nsshd: {log.read_text()}") from None
    for address in ADDRESSES:
        expect(f"{address}: " in trained, f"{trained}\nnothing was said by {address}")
    expect(set(ADDRESSES) <= set(by_mpi.split()), f"mpirun ran on {by_mpi}")
    expect(there.splitlines()[-2:] == [ODD, "/opt/venv/bin/deepspeed"], f"the environment there: {there}")
    found = losses(runs / "quickstart")
    expect(list(found) == list(range(1, 11)) and found[10] < found[1], f"losses {found}")
    return f"10 steps on 2 nodes, loss {found[1]:.2f} to {found[10]:.2f}"
