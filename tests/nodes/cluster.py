"""Nodes on one machine: Linux namespaces with an address, a host name, a home and an sshd each.

Nothing outside of the namespaces is changed, and they end with this process, however it ends. Every node sees the
folder SHARED with the same contents, and the folder OWN with its own. Needs root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "mount", "ssh", "ssh-keygen", "/usr/sbin/sshd")
PACKAGES = "iproute2, util-linux, openssh-client and openssh-server"
INTERFACE = "v0"
ERROR = re.compile(r"(?:rank \d+(?: on \w+)?: )?error: .*")
PATH = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
OPTIONS = ("--fork", "--kill-child", "--mount-proc")

INIT = """
set -e
hostname {name}
mount --make-rprivate /
mount --bind {base}/{name} {own}
mount --bind {base}/passwd /etc/passwd
mount --bind {base}/hosts /etc/hosts
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
until ip link set {interface} up 2>/dev/null; do sleep 0.02; done
ip address add {address}/24 dev {interface}
exec /usr/sbin/sshd -D -e -f /dev/null -o HostKey={base}/key -o AuthorizedKeysFile={base}/key.pub -o StrictModes=no \
    -o UsePAM=no -o PermitRootLogin=yes -o MaxStartups=50 -o PidFile=none
"""
SSH = """
Host *
    IdentityFile {base}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
{more}"""


def missing() -> str | None:
    """What this machine lacks for nodes, in one line; None if it lacks nothing."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)}: install {PACKAGES}"
    # A container without the right to make namespaces, or a kernel without veth.
    script = "mount --make-rprivate / && ip link add v0 type veth peer name v1"
    tried = subprocess.run([*_unshare(), "sh", "-c", script], capture_output=True, text=True)
    return f"cannot make namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def _unshare() -> list[str]:
    """Start the first process of new namespaces, which all end with this process."""
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *("--net", "--uts", "--mount", "--pid"), *OPTIONS]


@dataclass
class Finished:
    """A command that has ended.

    Attributes:
        code: its exit code; None if it had to be killed.
        text: its standard output and error, together.
        seconds: how long it took.
    """

    code: int | None
    text: str
    seconds: float

    def errors(self) -> list[str]:
        """The errors that our ranks have reported, without what launchers put before a line."""
        return ERROR.findall(self.text)


@dataclass
class Running:
    """A command that runs on a node."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[str], bool], seconds: float) -> None:
        """Wait until what it has written meets a condition.

        Raises:
            AssertionError: it does not in time, or the command has ended before.
        """
        end = time.monotonic() + seconds
        while not condition(self.text()):
            assert self.process.poll() is None, f"ended too early:\n{self.text()}"
            assert time.monotonic() < end, f"not within {seconds} s:\n{self.text()}"
            time.sleep(0.05)

    def finish(self, seconds: float) -> Finished:
        """Wait for its end; kill it if that does not come in time."""
        try:
            code: int | None = self.process.wait(max(0.1, self.started + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        return Finished(code, self.text(), time.monotonic() - self.started)


class Node:
    """One node, which exists as long as its first process.

    Args:
        name: its host name.
        address: its IPv4 address.
        base: the folder of the cluster.
    """

    def __init__(self, name: str, address: str, base: Path) -> None:
        self.name, self.address, self._base = name, address, base
        (base / name / "home" / ".ssh").mkdir(parents=True)
        init = INIT.format(name=name, address=address, base=base, own=base / "own", interface=INTERFACE)
        self._log = (base / f"{name}.sshd.log").open("wb")
        self._process = subprocess.Popen([*_unshare(), "bash", "-c", init], stdout=self._log, stderr=self._log)
        self.pid = self._first_process()

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        end = time.monotonic() + 10
        while not (found := children.read_text().split()):
            assert time.monotonic() < end and self._process.poll() is None, f"{self.name} did not start"
            time.sleep(0.01)
        return int(found[0])

    def inside(self, command: Sequence[str], *which: str) -> list[str]:
        """A command line that runs another one on this node."""
        namespaces = which or ("--net", "--uts", "--mount", "--pid", f"--wd={self._base / 'shared'}")
        return ["nsenter", "--target", str(self.pid), *namespaces, *command]

    def start(self, command: Sequence[str], **environment: str) -> Running:
        """Start a command in the shared folder, with the environment of a login and some variables more."""
        number = len(list(self._base.glob(f"{self.name}.*.log")))
        log = self._base / f"{self.name}.{number}.log"
        variables = {"HOME": str(self._base / "own" / "home"), "USER": "root", "LANG": "C.UTF-8", "PATH": PATH}
        words = [f"{key}={value}" for key, value in (variables | environment).items()]
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.inside(["env", "-i", *words, *command]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        return Running(process, log)

    def run(self, command: Sequence[str], seconds: float = 30, **environment: str) -> Finished:
        """Run a command to its end."""
        return self.start(command, **environment).finish(seconds)

    def run_quickly(self, command: str) -> str:
        """Run a short shell command that must succeed, and return what it prints."""
        done = subprocess.run(self.inside(["sh", "-c", command]), capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stderr}"
        return done.stdout

    def cut_off(self) -> None:
        """Take the link down: packets are lost, and nobody is told."""
        self.run_quickly(f"ip link set {INTERFACE} down")

    def end(self) -> None:
        """End every process of the node at once, as a power cut does."""
        self._process.kill()
        self._process.wait()
        self._log.close()


class Cluster:
    """Two nodes, ``node1`` and ``node2``, in a folder that must be empty or missing.

    Attributes:
        nodes: the two nodes.
        shared: a folder that both see.
        own: a folder of the same name on both, with the contents of each node's own.
    """

    def __init__(self, base: Path) -> None:
        self.base, self.shared, self.own = base, base / "shared", base / "own"
        self.nodes: list[Node] = []

    def __enter__(self) -> Cluster:
        for folder in (self.shared, self.own):
            folder.mkdir(parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.base / "key"], check=True)
        home = self.own / "home"
        accounts = Path("/etc/passwd").read_text().splitlines()
        (self.base / "passwd").write_text("".join(f"{_with_home(line, home)}\n" for line in accounts))
        addresses = {f"node{number}": f"10.77.0.{number}" for number in (1, 2)}
        others = {"node3": "10.77.0.3", "node4": "10.77.0.4"}  # nobody has these; see below
        hosts = {"localhost": "127.0.0.1", **addresses, **others}
        (self.base / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        try:
            self.nodes = [Node(name, address, self.base) for name, address in addresses.items()]
            first, second = self.nodes
            veth = ["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(second.pid)]
            subprocess.run(first.inside(veth, "--net"), check=True)
            self.configure_ssh("")
            for node in self.nodes:
                self._wait_until_reachable(node)
            # As a host behind a router: what is sent to it is lost, and nobody says so.
            silent = f"ip neighbour add 10.77.0.4 lladdr 02:00:00:00:00:04 nud permanent dev {INTERFACE}"
            first.run_quickly(silent)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            node.end()

    def configure_ssh(self, more: str) -> None:
        """Write every node's ~/.ssh/config, with further lines."""
        for name in ("node1", "node2"):
            path = self.base / name / "home" / ".ssh" / "config"
            path.write_text(SSH.format(base=self.base, more=more))
            path.chmod(0o600)

    def set_environment(self, **variables: str) -> None:
        """Write node1's ~/.deepspeed_env."""
        text = "".join(f"{name}={value}\n" for name, value in variables.items())
        (self.base / "node1" / "home" / ".deepspeed_env").write_text(text)

    def hostfile(self, slots: int, *names: str) -> Path:
        """Write a hostfile."""
        path = self.shared / f"hostfile-{'-'.join(names)}-{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in names))
        return path

    def _wait_until_reachable(self, node: Node) -> None:
        end = time.monotonic() + 20
        while (tried := self.nodes[0].run(["ssh", node.name, "hostname"])).text.split() != [node.name]:
            assert time.monotonic() < end, f"{node.name} cannot be reached: {tried.text}"
            time.sleep(0.1)


def _with_home(account: str, home: Path) -> str:
    fields = account.split(":")
    return ":".join([*fields[:5], str(home), "/bin/bash"]) if fields[0] == "root" else account
