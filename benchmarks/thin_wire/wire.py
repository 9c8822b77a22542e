"""Two network namespaces on one machine, joined by a virtual Ethernet pair with a token bucket at each end.

Nothing outside of the namespaces is changed, and they end with this process, however it ends. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "setpriv")
INTERFACE = "wire0"
ADDRESSES = ("10.78.0.1", "10.78.0.2")
BURST = "32kb"
"""What a bucket lets through at once after a pause: 2.6 ms at 100 Mbit/s, less than a round of collectives takes."""
QUEUE = "400ms"
"""How long a packet may wait for the bucket; long enough that TCP fills the wire and loses nothing."""


def missing() -> str | None:
    """What this machine lacks for a wire, in one line; None if it lacks nothing."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)}: install iproute2 and util-linux"
    script = (
        f"ip link add v0 type veth peer name v1 && tc qdisc add dev v0 root tbf rate 1mbit burst {BURST} latency 1s"
    )
    tried = subprocess.run(["unshare", "--net", "sh", "-c", script], capture_output=True, text=True)
    return f"cannot make a wire here: {tried.stderr.strip()}" if tried.returncode else None


class Wire:
    """Two ends of a wire, numbered 0 and 1, as a context."""

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Wire:
        try:
            # A namespace exists as long as a process in it.
            hold = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
            self._holders = [subprocess.Popen(hold) for _ in ADDRESSES]
            for holder in self._holders:
                _wait_for_namespace(holder.pid)
            far = str(self._holders[1].pid)
            self._run(0, "ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", far)
            for end, address in enumerate(ADDRESSES):
                self._run(end, "ip", "address", "add", f"{address}/24", "dev", INTERFACE)
                for interface in ("lo", INTERFACE):
                    self._run(end, "ip", "link", "set", interface, "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def inside(self, end: int, command: Sequence[str]) -> list[str]:
        """A command line that runs another one at an end, and dies with this process."""
        enter = ["nsenter", "--target", str(self._holders[end].pid), "--net"]
        return ["setpriv", "--pdeathsig", "KILL", *enter, *command]

    def limit(self, megabits: float | None) -> None:
        """Set how many Mbit/s pass each way, packet headers included; None for no limit."""
        for end in range(len(ADDRESSES)):
            if megabits is None:
                subprocess.run(self.inside(end, ["tc", "qdisc", "del", "dev", INTERFACE, "root"]), capture_output=True)
            else:
                bucket = ("rate", f"{round(megabits * 1000)}kbit", "burst", BURST, "latency", QUEUE)
                self._run(end, "tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *bucket)

    def sent(self) -> list[int]:
        """Bytes that each end has sent so far, packet headers included, by the counters of its interface."""
        return [_transmitted(holder.pid) for holder in self._holders]

    def _run(self, end: int, *command: str) -> None:
        done = subprocess.run(self.inside(end, command), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _wait_for_namespace(pid: int) -> None:
    deadline = time.monotonic() + 10
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{pid}/ns/net") == own:
        if time.monotonic() > deadline:
            raise RuntimeError("no network namespace within ten seconds")
        time.sleep(0.01)


def _transmitted(pid: int) -> int:
    """The ninth number of the interface's line, as a process in the namespace sees it."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return int(line.partition(":")[2].split()[8])
